"""A multi-turn trace: conversations over long documents, in an order that a seed fixes."""

from __future__ import annotations

import random
from dataclasses import dataclass

__all__ = ["TraceSettings", "Turn", "make_trace"]

_FIRST_TOKEN, _LAST_TOKEN = 100, 40_000


@dataclass(frozen=True)
class TraceSettings:
    """The shape of a trace; lengths in tokens, both ends included."""

    seed: int = 1
    conversations: int = 32
    requests: int = 160
    document: tuple[int, int] = (4_000, 12_000)
    question: tuple[int, int] = (40, 160)
    answer: tuple[int, int] = (100, 200)


@dataclass(frozen=True)
class Turn:
    """One request.

    Attributes
    ----------
    conversation, index : int
        Whose turn it is, and the how manyth.
    prompt : list of int
        Token ids of all that was said so far.
    """

    conversation: int
    index: int
    prompt: list[int]


def make_trace(settings: TraceSettings) -> list[Turn]:
    """Return the turns in the order in which they are sent.

    Which conversation goes on next is drawn with weights, so that some are busy and others pause for long, as
    people do.
    """
    rng = random.Random(settings.seed)

    def tokens(bounds: tuple[int, int]) -> list[int]:
        return [rng.randint(_FIRST_TOKEN, _LAST_TOKEN) for _ in range(rng.randint(*bounds))]

    weights = [rng.paretovariate(1.5) for _ in range(settings.conversations)]
    said: dict[int, list[int]] = {}
    counts = [0] * settings.conversations
    turns = []
    for _ in range(settings.requests):
        conversation = rng.choices(range(settings.conversations), weights)[0]
        before = said[conversation] + tokens(settings.answer) if conversation in said else None
        prompt = (before if before is not None else tokens(settings.document)) + tokens(settings.question)
        said[conversation] = prompt
        turns.append(Turn(conversation, counts[conversation], prompt))
        counts[conversation] += 1
    return turns
