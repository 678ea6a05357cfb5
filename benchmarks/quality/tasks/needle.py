"""Needle in a haystack: one fact in pages of prose, to be found again.

The haystack is held-out prose, without figures; the fact is a sentence with a number of five digits, at a
seeded depth before the recent window.

Kamradt, "Needle in a haystack: pressure testing LLMs", 2023.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

from benchmarks.quality.domains import DOMAINS
from benchmarks.quality.tasks.base import Document, Probe, Task, lay_out, tokeniser
from benchmarks.quality.tasks.words import draw_names, draw_numbers, sentences

__all__ = ["NeedleTask"]


@dataclass(frozen=True)
class NeedleTask(Task):
    """Contexts of prose with one fact each.

    Attributes
    ----------
    lengths : tuple[int, ...]
        Tokens of the contexts.
    per_length : int
        Contexts of each length.
    """

    lengths: tuple[int, ...] = (1024, 2048)
    per_length: int = 16

    name = "needle"
    metrics = ("accuracy", "kl")

    def documents(self, tokenizer: Any) -> list[Document]:
        """Generate the contexts; see `Task.documents`."""
        tokenise = tokeniser(tokenizer)
        prose = [tokenise(sentence) for sentence in sentences(DOMAINS["prose"].heldout)]
        found = []
        for length in self.lengths:
            for number in range(self.per_length):
                random = Random(f"{self.name}:{length}:{number}")
                [name], [code] = draw_names(1, random), draw_numbers(1, random)
                fact = tokenise(f"The secret code of the {name} is {code}.\n")
                start = random.randrange(len(prose))
                context = lay_out([fact], [*prose[start:], *prose[:start]], length, random)
                probe = Probe(tokenise(f"\n\nThe secret code of the {name} is"), tokenise(f" {code}"))
                found.append(Document(f"{length} tokens", context, (probe,)))
        return found
