"""What a task is: documents with contexts that are stored, and probes of what they still tell the model.

Contexts are put together from pieces that are turned into tokens one by one, so that a task knows where
every fact lies, and an answer's tokens are the same wherever it stands.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from benchmarks.quality import RECENT_WINDOW
from dynamo_kvtc.errors import EvaluationError

__all__ = ["Document", "Probe", "Task", "Tokenise", "lay_out", "tokeniser"]

#: Turns a piece of text into token ids, without special tokens.
Tokenise = Callable[[str], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Probe:
    """A question behind a context, or several that build on each other.

    Attributes
    ----------
    suffix : tuple[int, ...]
        Token ids that follow the context; they are never stored.
    answer : tuple[int, ...]
        The token ids that should follow them.
    further : tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
        Further suffixes and answers, each behind the answer before it. Right is a probe of which all
        answers are.
    """

    suffix: tuple[int, ...]
    answer: tuple[int, ...]
    further: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()

    def __post_init__(self) -> None:
        if not all(suffix and answer for suffix, answer in self._turns):
            raise EvaluationError("a probe needs at least one token of suffix and one of answer")

    @property
    def _turns(self) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
        return ((self.suffix, self.answer), *self.further)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Everything that follows the context, answers included."""
        return tuple(token for turn in self._turns for part in turn for token in part)

    @property
    def targets(self) -> tuple[int, ...]:
        """The tokens of all answers."""
        return tuple(token for _, answer in self._turns for token in answer)

    @property
    def places(self) -> tuple[int, ...]:
        """Where in `token_ids` each of the targets is predicted: one before the target itself."""
        places: list[int] = []
        start = 0
        for suffix, answer in self._turns:
            first = start + len(suffix)
            start = first + len(answer)
            places += range(first - 1, start - 1)
        return tuple(places)


@dataclass(frozen=True, slots=True)
class Document:
    """A context and its probes.

    Attributes
    ----------
    group : str
        What its scores are reported under, such as a domain or a length.
    context : tuple[int, ...]
        Token ids from position 0 on; all but the recent window are stored.
    probes : tuple[Probe, ...]
        At least one; each is put behind the context alone.
    """

    group: str
    context: tuple[int, ...]
    probes: tuple[Probe, ...]

    def __post_init__(self) -> None:
        if self.stored_tokens < 1 or not self.probes:
            raise EvaluationError(
                f"a document of {len(self.context)} tokens with {len(self.probes)} probes measures nothing; "
                f"contexts need more than the recent window of {RECENT_WINDOW}"
            )

    @property
    def stored_tokens(self) -> int:
        """Leading tokens of the context that codecs store."""
        return len(self.context) - RECENT_WINDOW


class Task(ABC):
    """A source of documents.

    Attributes
    ----------
    name : str
        Name in the registry.
    metrics : tuple[str, ...]
        What its rows report, names of `benchmarks.quality.summary.METRICS`.
    """

    name: str
    metrics: tuple[str, ...]

    @abstractmethod
    def documents(self, tokenizer: Any) -> list[Document]:
        """Return the task's documents for a model's tokenizer; the same ones in every run."""


def tokeniser(tokenizer: Any) -> Tokenise:
    """Return a function that turns pieces of text into the ids of a model's tokenizer."""

    def tokenise(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    return tokenise


def lay_out(
    facts: Sequence[tuple[int, ...]], filler: Sequence[tuple[int, ...]], tokens: int, random: Random
) -> tuple[int, ...]:
    """Spread facts over a context of filler: in their order, at random depths, before the recent window.

    Parameters
    ----------
    facts : Sequence[tuple[int, ...]]
        Token ids of each fact.
    filler : Sequence[tuple[int, ...]]
        Token ids of pieces to put between them; taken in their order, from the first on again if need be.
    tokens : int
        Tokens of the context; the last piece is cut there.
    random : Random
        Chooses the depths.

    Raises
    ------
    EvaluationError
        If the facts do not fit before the recent window.
    """
    longest = max(len(piece) for piece in filler)
    room = tokens - RECENT_WINDOW - longest - sum(len(fact) for fact in facts)
    if room < 0:
        raise EvaluationError(
            f"{len(facts)} facts do not fit into a context of {tokens} tokens; use longer contexts"
        )
    # A fact follows the first whole piece of filler that reaches its depth, so it ends before the window.
    depths = sorted(random.randint(0, room) for _ in facts)
    context: list[int] = []
    filled = turn = 0

    def fill() -> int:
        nonlocal turn
        piece = filler[turn % len(filler)]
        turn += 1
        context.extend(piece)
        return len(piece)

    for depth, fact in zip(depths, facts, strict=True):
        while filled < depth:
            filled += fill()
        context.extend(fact)
    while len(context) < tokens:
        fill()
    return tuple(context[:tokens])
