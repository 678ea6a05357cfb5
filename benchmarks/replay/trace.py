"""A trace of conversations, made from real text by a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Turn:
    """One request: the whole sequence so far."""

    conversation: int
    turn: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class TraceSettings:
    """The shape of a trace, in tokens.

    Attributes
    ----------
    shared : int
        Length of the beginning that all conversations have in common, as a system prompt is.
    first, growth : int
        What a conversation adds in its first turn, and in each later one (question and answer).
    """

    conversations: int = 6
    turns: int = 4
    shared: int = 256
    first: int = 1024
    growth: int = 384
    seed: int = 0

    @property
    def longest(self) -> int:
        """Tokens of a conversation's last turn."""
        return self.shared + self.first + (self.turns - 1) * self.growth

    def with_seed(self, seed: int) -> TraceSettings:
        """Return a trace of the same shape with other text."""
        return replace(self, seed=seed)


def make_trace(corpus: Sequence[int], settings: TraceSettings) -> list[Turn]:
    """Cut conversations out of a tokenised corpus and interleave their turns.

    Every piece of text is taken from its own place, chosen by the seed. A conversation keeps the order of its
    turns; between two of them any number of others may come.
    """
    source = random.Random(settings.seed)

    def piece(length: int) -> list[int]:
        start = source.randrange(len(corpus) - length)
        return list(corpus[start : start + length])

    shared = piece(settings.shared)
    waiting: list[list[Turn]] = []
    for conversation in range(settings.conversations):
        tokens, turns = [*shared, *piece(settings.first)], []
        for turn in range(settings.turns):
            turns.append(Turn(conversation, turn, tuple(tokens)))
            tokens = [*tokens, *piece(settings.growth)]
        waiting.append(turns)
    trace = []
    while waiting:
        turns = source.choice(waiting)
        trace.append(turns.pop(0))
        if not turns:
            waiting.remove(turns)
    return trace
