"""Variable tracking: references from key to key, to be followed to a number.

A context is a list of JSON pairs. A chain gives a number to a key, refers to that key from a second one and
to the second from a third; pairs of chains are mixed with each other and with pairs of numbers, and no key
of a chain shares a word with another key. A probe starts at the second key (one hop) or the third (two hops)
and follows the chain: each reference and then the number must be predicted, every one of them over the
stored pairs. The model is led from step to step (the text between two answers is given), without which
models below a billion parameters are at chance.

After Hsieh et al., "RULER", arXiv 2404.06654, section 3, variable tracking.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

from benchmarks.quality import RECENT_WINDOW
from benchmarks.quality.tasks.base import Document, Probe, Task, Tokenise, tokeniser
from benchmarks.quality.tasks.words import draw_names, draw_numbers, draw_unlike_names
from dynamo_kvtc.errors import EvaluationError

__all__ = ["TrackingTask"]

#: Keys of a chain: its number is given to the first.
_CHAIN = 3


@dataclass(frozen=True)
class TrackingTask(Task):
    """Contexts of pairs with chains among them.

    Attributes
    ----------
    lengths : tuple[int, ...]
        Tokens of the contexts.
    per_length, chains : int
        Contexts of each length, and chains in each.
    """

    lengths: tuple[int, ...] = (768,)
    per_length: int = 16
    chains: int = 4

    name = "tracking"
    metrics = ("accuracy", "kl")

    def documents(self, tokenizer: Any) -> list[Document]:
        """Generate the contexts; see `Task.documents`. One and two hops are documents of their own."""
        return [
            document
            for length in self.lengths
            for number in range(self.per_length)
            for document in self._documents(tokeniser(tokenizer), length, number)
        ]

    def _documents(self, tokenise: Tokenise, length: int, number: int) -> list[Document]:
        random = Random(f"{self.name}:{length}:{number}")
        chained = draw_unlike_names(_CHAIN * self.chains, random)
        chains = [chained[start : start + _CHAIN] for start in range(0, len(chained), _CHAIN)]
        taken = {word for name in chained for word in name.split()}
        names = [name for name in draw_names(length, random) if taken.isdisjoint(name.split())]
        values = draw_numbers(length, random)
        linked = [
            tokenise(_pair(chain[step], f"@{chain[step - 1]}" if step else value))
            for step in range(_CHAIN)
            for chain, value in random.sample(list(zip(chains, values, strict=False)), self.chains)
        ]
        plain = [
            tokenise(_pair(name, value)) for name, value in zip(names, values[self.chains :], strict=False)
        ]
        context = self._mix(tokenise, linked, plain, length, random)
        return [
            Document(
                group=f"{hops} hop{'s' if hops > 1 else ''}, {length} tokens",
                context=context,
                probes=tuple(
                    _probe(tokenise, chain[: hops + 1], value)
                    for chain, value in zip(chains, values, strict=False)
                ),
            )
            for hops in range(1, _CHAIN)
        ]

    def _mix(
        self,
        tokenise: Tokenise,
        linked: list[tuple[int, ...]],
        plain: list[tuple[int, ...]],
        length: int,
        random: Random,
    ) -> tuple[int, ...]:
        """Put the chains' pairs at random places between the others, before the recent window."""
        opening = tokenise("Here is a list of keys and their values, as JSON.\n\n{\n")
        longest = max(len(pair) for pair in (*linked, *plain))
        places = (length - RECENT_WINDOW - len(opening)) // longest
        if places < len(linked):
            raise EvaluationError(
                f"{self.chains} chains do not fit into a context of {length} tokens; use longer contexts"
            )
        chosen = set(random.sample(range(places), len(linked)))
        next_linked, next_plain = iter(linked), iter(plain)
        context = list(opening)
        place = 0
        while len(context) < length:
            context += next(next_linked if place in chosen else next_plain)
            place += 1
        return tuple(context[:length])


def _pair(name: str, value: str) -> str:
    return f' "{name}": "{value}",\n'


def _probe(tokenise: Tokenise, chain: list[str], value: str) -> Probe:
    """Return the way from the last key of a chain to its number."""
    steps = list(reversed(chain))
    first, *further = [
        (
            tokenise(f'value of "{name}" in the list above is "' + ("" if target == value else "@")),
            tokenise(target),
        )
        for name, target in zip(steps, [*steps[1:], value], strict=True)
    ]
    opening, link = tokenise("\n}\n\nThe "), tokenise('", and the ')
    return Probe(opening + first[0], first[1], tuple((link + suffix, answer) for suffix, answer in further))
