"""The evaluation protocol: how documents are cut and which positions are replaced."""

from __future__ import annotations

from dataclasses import dataclass

from dynamo_kvtc.errors import EvaluationError

__all__ = ["EvaluationProtocol"]


@dataclass(frozen=True, slots=True)
class EvaluationProtocol:
    """Sizes of one evaluation, in tokens unless said otherwise.

    A document is a context and the tokens scored behind it. Of the context, the positions from
    `sink_tokens` up to `coded_stop` are replaced by what real streams decode to; the sinks before them
    and the recent window behind them stay as the model computed them.

    Attributes
    ----------
    documents : int
        How many documents.
    context_tokens, scored_tokens : int
        Sizes of a document's two parts.
    sink_tokens : int
        Leading positions that are stored in the first stream at high precision.
    recent_window : int
        Last positions of the context, never stored lossily.
    tier_block_tokens : int
        Tokens per stream; the last one of a document is shorter where this does not divide `coded_stop`.

    Raises
    ------
    EvaluationError
        If nothing would be replaced or scored.
    """

    documents: int = 8
    context_tokens: int = 1024
    scored_tokens: int = 256
    sink_tokens: int = 4
    recent_window: int = 128
    tier_block_tokens: int = 256

    def __post_init__(self) -> None:
        if min(self.documents, self.scored_tokens, self.recent_window) < 1 or self.sink_tokens < 0:
            raise EvaluationError(f"documents, scored tokens and window must be positive: {self}")
        if self.coded_stop <= self.sink_tokens:
            raise EvaluationError(
                f"a context of {self.context_tokens} tokens holds nothing between {self.sink_tokens} sinks "
                f"and a window of {self.recent_window}; use a longer context"
            )
        if self.tier_block_tokens <= self.sink_tokens:
            raise EvaluationError(
                f"tier blocks of {self.tier_block_tokens} tokens must be longer than the "
                f"{self.sink_tokens} sinks"
            )

    @property
    def document_tokens(self) -> int:
        """Tokens of a document."""
        return self.context_tokens + self.scored_tokens

    @property
    def coded_stop(self) -> int:
        """One past the last position that is stored in streams."""
        return self.context_tokens - self.recent_window

    def tier_blocks(self) -> list[tuple[int, int]]:
        """Return the half-open position ranges of a document's streams."""
        return [
            (first, min(first + self.tier_block_tokens, self.coded_stop))
            for first in range(0, self.coded_stop, self.tier_block_tokens)
        ]
