"""How much of an onboard holds: it ends in front of the first tier block that failed."""

from __future__ import annotations

from collections.abc import Sequence

from dynamo_kvtc.errors import OnboardError
from dynamo_kvtc.pipeline.blocks import TierBlockRef
from dynamo_kvtc.tiers.base import TierKey

__all__ = ["SoundPrefix"]


class SoundPrefix:
    """The tier blocks of a request in front of the first one that failed, and why that one did.

    Attributes
    ----------
    refs : Sequence[TierBlockRef]
        Every tier block that was asked for.
    count : int
        Of how many leading ones nothing has failed so far.
    cause : BaseException, optional
        What ended the request in front of the others.
    """

    def __init__(self, refs: Sequence[TierBlockRef]) -> None:
        self.refs = refs
        self.count = len(refs)
        self.cause: BaseException | None = None

    @property
    def whole(self) -> bool:
        """Whether no tier block has failed."""
        return self.count == len(self.refs)

    @property
    def keys(self) -> list[TierKey]:
        """Keys of the sound tier blocks."""
        return [ref.key for ref in self.refs[: self.count]]

    def end_before(self, index: int, error: BaseException) -> None:
        """Shorten the request to the tier blocks before `index`; the failure furthest in front counts."""
        if index < self.count:
            self.count = index
            self.cause = error

    def error(self) -> OnboardError | None:
        """Return what the engine is told, or None if everything held."""
        if self.cause is None:
            return None
        start = self.refs[self.count].first_position
        stop = self.refs[-1].first_position + self.refs[-1].num_tokens
        error = OnboardError(
            f"tokens {start} to {stop} could not be onboarded and must be recomputed: {self.cause}",
            [(start, stop)],
        )
        error.__cause__ = self.cause
        return error
