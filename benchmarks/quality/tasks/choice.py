"""Small skills shown by examples: sums, products, categories, and copying a list on from a given place.

The context holds examples only, so what is measured is whether a model still does the skill, with as little
loss, behind a stored context. Of copying, the part that is asked for lies before the recent window.

Kinds that models below a billion parameters do at chance are not part of it: the odd word out of four and
multiple choice by letter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from benchmarks.quality import RECENT_WINDOW
from benchmarks.quality.tasks.base import Document, Probe, Task, Tokenise, tokeniser
from benchmarks.quality.tasks.words import CATEGORIES, draw_names

__all__ = ["ChoiceTask"]

#: Lines of the list that a probe of copying shows again.
_SHOWN = 2


@dataclass(frozen=True)
class ChoiceTask(Task):
    """Contexts of examples.

    Attributes
    ----------
    context_tokens : int
        Tokens of the contexts.
    per_kind, probes : int
        Contexts of each kind, and probes behind each.
    kinds : tuple[str, ...]
        Which kinds.
    """

    context_tokens: int = 768
    per_kind: int = 8
    probes: int = 8
    kinds: tuple[str, ...] = ("addition", "product", "category", "copying")

    name = "choice"
    metrics = ("accuracy", "kl")

    def documents(self, tokenizer: Any) -> list[Document]:
        """Generate the contexts; see `Task.documents`."""
        tokenise = tokeniser(tokenizer)
        found = []
        for kind in self.kinds:
            for number in range(self.per_kind):
                random = Random(f"{self.name}:{kind}:{number}")
                make = self._copying if kind == "copying" else self._examples
                context, probes = make(kind, tokenise, random)
                found.append(Document(kind, tuple(context[: self.context_tokens]), tuple(probes)))
        return found

    def _examples(self, kind: str, tokenise: Tokenise, random: Random) -> tuple[list[int], list[Probe]]:
        draw = _QUESTIONS[kind]
        context: list[int] = []
        while len(context) < self.context_tokens:
            question, answer = draw(random)
            context += tokenise(f"{question} {answer}\n")
        questions = [draw(random) for _ in range(self.probes)]
        return context, [Probe(tokenise(f"\n{q}"), tokenise(f" {a}")) for q, a in questions]

    def _copying(self, kind: str, tokenise: Tokenise, random: Random) -> tuple[list[int], list[Probe]]:
        names = draw_names(self.context_tokens, random)
        context: list[int] = []
        askable = 0
        for name in names:
            context += tokenise(f"{name}\n")
            if len(context) <= self.context_tokens - RECENT_WINDOW:
                askable += 1
            if len(context) >= self.context_tokens:
                break
        probes = []
        for place in random.sample(range(_SHOWN, askable), self.probes):
            shown = "\n".join(names[place - _SHOWN : place])
            probes.append(Probe(tokenise(f"\n\n{shown}\n"), tokenise(names[place])))
        return context, probes


def _addition(random: Random) -> tuple[str, str]:
    a, b = random.randint(1, 9), random.randint(1, 9)
    return f"{a} + {b} =", str(a + b)


def _product(random: Random) -> tuple[str, str]:
    a, b = random.randint(2, 9), random.randint(2, 9)
    return f"{a} * {b} =", str(a * b)


def _category(random: Random) -> tuple[str, str]:
    category = random.choice(sorted(CATEGORIES))
    return f"{random.choice(CATEGORIES[category])} is a kind of", category


#: Draws a question and its answer.
_QUESTIONS: dict[str, Callable[[Random], tuple[str, str]]] = {
    "addition": _addition,
    "product": _product,
    "category": _category,
}
