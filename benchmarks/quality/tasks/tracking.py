"""Variable tracking: chains of assignments spread over prose, and the value at some place of a chain.

A chain assigns a number to a variable, that variable to a second and the second to a third. Asked for are
the second variable (one hop) and the third (two hops), whose numbers stand in the context once, behind the
first variable. Assignments of all chains are mixed, those of one chain stay in order.

Hsieh et al., "RULER", arXiv 2404.06654, section 3, variable tracking; asked for is a value, not all names.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from random import Random
from typing import Any

from benchmarks.quality.domains import DOMAINS
from benchmarks.quality.tasks.base import Document, Probe, Task, lay_out, tokeniser
from benchmarks.quality.tasks.words import draw_numbers, sentences

__all__ = ["TrackingTask"]

_CHAIN = 3


@dataclass(frozen=True)
class TrackingTask(Task):
    """Contexts of prose with chains of assignments.

    Attributes
    ----------
    lengths : tuple[int, ...]
        Tokens of the contexts.
    per_length, chains : int
        Contexts of each length, and chains in each.
    """

    lengths: tuple[int, ...] = (1024,)
    per_length: int = 16
    chains: int = 3

    name = "tracking"
    metrics = ("accuracy", "kl")

    def documents(self, tokenizer: Any) -> list[Document]:
        """Generate the contexts; see `Task.documents`. One and two hops are documents apart."""
        return [
            document
            for length in self.lengths
            for number in range(self.per_length)
            for document in self._documents(tokenizer, length, number)
        ]

    def _documents(self, tokenizer: Any, length: int, number: int) -> list[Document]:
        tokenise = tokeniser(tokenizer)
        random = Random(f"{self.name}:{length}:{number}")
        names = _draw_variables(_CHAIN * self.chains, random)
        chains = [names[start : start + _CHAIN] for start in range(0, len(names), _CHAIN)]
        values = draw_numbers(self.chains, random)
        order = random.sample(range(self.chains), self.chains)
        lines = []
        for step in range(_CHAIN):
            for chain in order:
                source = values[chain] if step == 0 else chains[chain][step - 1]
                lines.append(tokenise(f"\n{chains[chain][step]} = {source}\n"))
        prose = sentences(DOMAINS["prose"].heldout)
        start = random.randrange(len(prose))
        filler = [tokenise(prose[(start + index) % len(prose)]) for index in range(length // 4)]
        context = lay_out(lines, filler, length, random)
        return [
            Document(
                group=f"{hops} hop{'s' if hops > 1 else ''}, {length} tokens",
                context=context,
                probes=tuple(
                    Probe(tokenise(f"\n\nThe value of {chain[hops]} is"), tokenise(f" {value}"))
                    for chain, value in zip(chains, values, strict=True)
                ),
            )
            for hops in range(1, _CHAIN)
        ]


def _draw_variables(count: int, random: Random) -> list[str]:
    """Return different names of four capital letters."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(random.choices(string.ascii_uppercase, k=4))] = None
    return list(found)
