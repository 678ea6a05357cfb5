"""Onboard or recompute, store or skip: decided from measured costs.

The cost of onboarding is the longer one of transfer and decode, which overlap, plus a measured overhead; the
cost of not onboarding is the prefill of the same tokens. Where a speed is not known yet, nothing is decided
by cost: everything found is promised, everything the window leaves is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.observability import Action
from dynamo_kvtc.policy.speeds import Speeds

__all__ = ["CostPolicy", "CostSettings", "Estimate", "Piece", "PrefixDecision", "estimate_onboard"]


@dataclass(frozen=True, slots=True)
class Piece:
    """One stored tier block: its tokens, its bytes, and the tier that it would be read from."""

    tokens: int
    nbytes: int
    tier: str


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
    prefill, decode = speeds.prefill, speeds.decode
    if prefill is None or decode is None:
        return None
    estimates, tokens, transfer_s = [], 0, 0.0
    for piece in pieces:
        read = speeds.read_speed(piece.tier)
        if read is None:
            return None
        tokens += piece.tokens
        transfer_s += piece.nbytes / read
        estimates.append(Estimate(tokens, transfer_s, tokens / decode, speeds.overhead_s, tokens / prefill))
    return estimates


@dataclass(frozen=True, slots=True)
class CostSettings:
    """How costs are weighed.

    Attributes
    ----------
    enabled : bool
        False: no decision by cost.
    hysteresis : float
        After a prefix was refused, onboarding must be faster than recomputing by this share before one is
        promised again, so that noise does not turn decisions over.
    probe_every : int
        Every so manieth refusal in a row is let through: costs that are not paid are not measured.
    """

    enabled: bool = True
    hysteresis: float = 0.2
    probe_every: int = 64

    def __post_init__(self) -> None:
        if self.hysteresis < 0 or self.probe_every < 1:
            raise ConfigError(f"hysteresis must not be negative and probe_every at least 1: {self}")


@dataclass(frozen=True, slots=True)
class PrefixDecision:
    """How many of the leading tier blocks to onboard, why, and the estimate of the longest run, if any."""

    blocks: int
    action: Action
    estimate: Estimate | None


class CostPolicy:
    """Decides by cost, with hysteresis. Belongs to one event loop.

    Parameters
    ----------
    speeds : Speeds
        Read at every decision.
    """

    def __init__(self, speeds: Speeds, settings: CostSettings | None = None) -> None:
        self.speeds, self.settings = speeds, settings or CostSettings()
        self._refusals = {"onboard": 0, "offload": 0}

    def prefix(self, pieces: Sequence[Piece]) -> PrefixDecision:
        """Decide how much of a found prefix is worth onboarding: the run that saves most, or nothing."""
        estimates = estimate_onboard(pieces, self.speeds) if self.settings.enabled else None
        if not estimates:
            return PrefixDecision(len(pieces), "onboard", None)
        margin = self._margin("onboard")
        saved = [one.recompute_s - one.onboard_s * margin for one in estimates]
        best = max(range(len(saved)), key=lambda index: saved[index])
        if saved[best] > 0:
            self._refusals["onboard"] = 0
            whole = best == len(pieces) - 1
            return PrefixDecision(best + 1, "onboard" if whole else "trim", estimates[-1])
        if self._probes("onboard"):
            return PrefixDecision(len(pieces), "probe", estimates[-1])
        return PrefixDecision(0, "recompute", estimates[-1])

    def store(self, blocks: int, tokens: int, encoder: str, tier: str) -> Action:
        """Decide whether a sequence's tier blocks are worth storing.

        Parameters
        ----------
        blocks, tokens : int
            The leading tier blocks that the recent window leaves, and the tokens of each.
        encoder, tier : str
            How they would be stored, and the fastest tier that they would be read from.
        """
        nbytes = self.speeds.token_bytes(encoder)
        if not self.settings.enabled or not blocks or nbytes is None:
            return "compress"
        estimates = estimate_onboard([Piece(tokens, round(tokens * nbytes), tier)] * blocks, self.speeds)
        if not estimates:
            return "compress"
        if any(one.recompute_s > one.onboard_s * self._margin("offload") for one in estimates):
            self._refusals["offload"] = 0
            return "compress"
        return "probe" if self._probes("offload") else "skip"

    def _margin(self, step: str) -> float:
        return 1 + self.settings.hysteresis * bool(self._refusals[step])

    def _probes(self, step: str) -> bool:
        self._refusals[step] += 1
        return self._refusals[step] % self.settings.probe_every == 0
