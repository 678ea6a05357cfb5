"""Onboard or recompute: decided from measured costs.

The cost of onboarding is the longer one of transfer and decode, which overlap, plus a measured overhead; the
cost of not onboarding is the prefill of the same tokens. Where a speed is not known yet, nothing is decided
by cost: everything found is promised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.observability import Action
from dynamo_kvtc.policy.speeds import Speeds

__all__ = [
    "CostPolicy",
    "CostSettings",
    "Estimate",
    "Piece",
    "PrefixDecision",
    "Refusals",
    "estimate_onboard",
]


@dataclass(frozen=True, slots=True)
class Piece:
    """One stored tier block: its tokens, its bytes, the tier it would be read from, what it was encoded with.

    The name of the encoder tells how fast it decodes; None is any of the artifact's plans.
    """

    tokens: int
    nbytes: float
    tier: str
    encoder: str | None = None


@dataclass(frozen=True, slots=True)
class Estimate:
    """What onboarding a prefix is expected to take, and recomputing it, in seconds.

    Attributes
    ----------
    transfer_s, decode_s, overhead_s : float
        The parts of onboarding.
    recompute_s : float
        Prefill of the same tokens.
    """

    tokens: int
    transfer_s: float
    decode_s: float
    overhead_s: float
    recompute_s: float

    @property
    def onboard_s(self) -> float:
        """Seconds of the onboard: what overlaps counts once."""
        return max(self.transfer_s, self.decode_s) + self.overhead_s


def estimate_onboard(pieces: Sequence[Piece], speeds: Speeds) -> list[Estimate] | None:
    """Return the estimate of each leading run of `pieces`: of the first, the first two, and so on.

    Returns
    -------
    list[Estimate] or None
        None if a speed that is needed is not known.
    """
    prefill = speeds.prefill
    if prefill is None:
        return None
    estimates, tokens, transfer_s, decode_s = [], 0, 0.0, 0.0
    for piece in pieces:
        read, decode = speeds.read_speed(piece.tier), speeds.decode_speed(piece.encoder)
        if read is None or decode is None:
            return None
        tokens += piece.tokens
        transfer_s += piece.nbytes / read
        decode_s += piece.tokens / decode
        estimates.append(Estimate(tokens, transfer_s, decode_s, speeds.overhead_s, tokens / prefill))
    return estimates


@dataclass(frozen=True, slots=True)
class CostSettings:
    """How costs are weighed.

    Attributes
    ----------
    enabled : bool
        False: no decision by cost.
    hysteresis : float
        The margin of decisions: after a prefix was refused, onboarding must be faster than recomputing by
        this share before one is promised again; a coarser plan or raw must be faster by it than what is
        stored with now. So noise does not turn decisions over.
    probe_every : int
        Of so many refusals in a row the last is let through: costs that are not paid are not measured.
    """

    enabled: bool = True
    hysteresis: float = 0.2
    probe_every: int = 64

    def __post_init__(self) -> None:
        if self.hysteresis < 0 or self.probe_every < 1:
            raise ConfigError(f"hysteresis must not be negative and probe_every at least 1: {self}")


@dataclass(slots=True)
class Refusals:
    """Refusals in a row of one kind of decision."""

    settings: CostSettings
    count: int = 0

    @property
    def margin(self) -> float:
        """By which factor recomputing must be slower now for onboarding to be worth it."""
        return 1 + self.settings.hysteresis * bool(self.count)

    def accept(self) -> None:
        """Take in that something was worth it."""
        self.count = 0

    def refuse(self) -> bool:
        """Take in that nothing was; returns whether it is let through all the same, as a probe."""
        self.count += 1
        return self.count % self.settings.probe_every == 0


@dataclass(frozen=True, slots=True)
class PrefixDecision:
    """How many of the leading tier blocks to onboard, why, and the estimate of the longest run, if any."""

    blocks: int
    action: Action
    estimate: Estimate | None


class CostPolicy:
    """Decides by cost what is promised, with hysteresis. Belongs to one event loop.

    Parameters
    ----------
    speeds : Speeds
        Read at every decision.
    """

    def __init__(self, speeds: Speeds, settings: CostSettings | None = None) -> None:
        self.speeds, self.settings = speeds, settings or CostSettings()
        self._refusals = Refusals(self.settings)

    def prefix(self, pieces: Sequence[Piece]) -> PrefixDecision:
        """Decide how much of a found prefix is worth onboarding: the run that saves most, or nothing."""
        estimates = estimate_onboard(pieces, self.speeds) if self.settings.enabled else None
        if not estimates:
            return PrefixDecision(len(pieces), "onboard", None)
        margin = self._refusals.margin
        saved = [one.recompute_s - one.onboard_s * margin for one in estimates]
        best = max(range(len(saved)), key=lambda index: saved[index])
        if saved[best] > 0:
            self._refusals.accept()
            whole = best == len(pieces) - 1
            return PrefixDecision(best + 1, "onboard" if whole else "trim", estimates[-1])
        if self._refusals.refuse():
            return PrefixDecision(len(pieces), "probe", estimates[-1])
        return PrefixDecision(0, "recompute", estimates[-1])
