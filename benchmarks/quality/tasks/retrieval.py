"""Key-value retrieval: a context of JSON pairs, and the value of one of them to be found.

The pairs fill the context; asked for are some that end before the recent window. Keys are names of two words,
values numbers of five digits; each stands in a context once.

Liu et al., "Lost in the middle", arXiv 2307.03172, section 3; with shorter keys, so that models below a
billion parameters can solve it.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

from benchmarks.quality import RECENT_WINDOW
from benchmarks.quality.tasks.base import Document, Probe, Task, tokeniser
from benchmarks.quality.tasks.words import draw_names, draw_numbers

__all__ = ["RetrievalTask"]


@dataclass(frozen=True)
class RetrievalTask(Task):
    """Contexts of pairs.

    Attributes
    ----------
    lengths : tuple[int, ...]
        Tokens of the contexts.
    per_length, probes : int
        Contexts of each length, and pairs asked for in each.
    """

    lengths: tuple[int, ...] = (1024, 2048)
    per_length: int = 16
    probes: int = 8

    name = "retrieval"
    metrics = ("accuracy", "kl")

    def documents(self, tokenizer: Any) -> list[Document]:
        """Generate the contexts; see `Task.documents`."""
        return [
            self._document(tokenizer, length, number)
            for length in self.lengths
            for number in range(self.per_length)
        ]

    def _document(self, tokenizer: Any, length: int, number: int) -> Document:
        tokenise = tokeniser(tokenizer)
        random = Random(f"{self.name}:{length}:{number}")
        opening = "Here is a list of keys and their values, as JSON.\n\n{\n"
        context = list(tokenise(opening))
        names, values = draw_names(length, random), draw_numbers(length, random)
        pairs: list[tuple[str, str]] = []
        for name, value in zip(names, values, strict=True):
            context += tokenise(f' "{name}": "{value}",\n')
            if len(context) > length - RECENT_WINDOW:
                if len(context) >= length:
                    break
                continue
            pairs.append((name, value))
        asked = random.sample(pairs, self.probes)
        return Document(
            group=f"{length} tokens",
            context=tuple(context[:length]),
            probes=tuple(
                Probe(tokenise(f'\n}}\n\nThe value of "{name}" in the list above is "'), tokenise(value))
                for name, value in asked
            ),
        )
