"""How a sequence is stored, or that it is not: decided from what having it back is expected to take.

Candidates are the plans that the operator allows and raw. A coarser plan is taken only where it buys time,
and raw only where it is clearly faster than every plan: quality is not paid for bytes that nobody waits for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dynamo_kvtc.observability import Action
from dynamo_kvtc.policy.decide import CostSettings, Piece, Refusals, estimate_onboard
from dynamo_kvtc.policy.speeds import Speeds

__all__ = ["Candidate", "StoreCost", "StoreDecision", "StorePolicy"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to store tier blocks.

    Attributes
    ----------
    encoder : str
        Its name.
    token_bytes : float
        Stored bytes per token, measured or as its plan states.
    tiers : tuple[str, ...]
        Names of the tiers that would hold it, from fast to slow: all, or the leading ones.
    action : Action
        What choosing it is counted as: compress, coarser, gentler or raw.
    """

    encoder: str
    token_bytes: float
    tiers: tuple[str, ...]
    action: Action = "compress"


@dataclass(frozen=True, slots=True)
class StoreCost:
    """What a candidate would cost, in seconds.

    Attributes
    ----------
    onboard_s : float
        Having the sequence back from the fastest tier.
    expected_s : float
        Having it back from where it is expected to lie; recomputing it counts where that is faster or where
        the tier would not hold it.
    recompute_s : float
        Prefill of the same tokens.
    """

    onboard_s: float
    expected_s: float
    recompute_s: float


@dataclass(frozen=True, slots=True)
class StoreDecision:
    """What to do.

    Attributes
    ----------
    action : Action
        The chosen candidate's, or probe or skip.
    candidate : Candidate, optional
        What to store with; None stores nothing.
    costs : tuple[StoreCost, ...]
        One for each candidate; none where a speed is not known or nothing is decided by cost.
    """

    action: Action
    candidate: Candidate | None
    costs: tuple[StoreCost, ...] = ()


class StorePolicy:
    """Decides with what sequences are stored, with hysteresis. Belongs to one event loop."""

    def __init__(self, speeds: Speeds, settings: CostSettings | None = None) -> None:
        self.speeds, self.settings = speeds, settings or CostSettings()
        self._refusals = Refusals(self.settings)
        #: Encoder that was chosen last.
        self.current: str | None = None

    def decide(self, tokens: int, candidates: Sequence[Candidate], tiers: Sequence[str]) -> StoreDecision:
        """Decide about the `tokens` leading tokens of a sequence that its recent window leaves.

        Parameters
        ----------
        candidates : Sequence[Candidate]
            The one to store with when nothing is known first, then coarser ones, raw last. None: nothing can
            be stored.
        tiers : Sequence[str]
            Names of all tiers, from fast to slow.
        """
        if not candidates:
            return StoreDecision("skip", None)
        costs = self.costs(tokens, candidates, tiers) if self.settings.enabled else ()
        if not costs:
            return StoreDecision(candidates[0].action, candidates[0])
        margin = self._refusals.margin
        worth = [index for index, one in enumerate(costs) if one.onboard_s * margin < one.recompute_s]
        if not worth:
            if self._refusals.refuse():
                return StoreDecision("probe", candidates[0], costs)
            return StoreDecision("skip", None, costs)
        self._refusals.accept()
        chosen = self._choose(worth, candidates, costs)
        self.current = candidates[chosen].encoder
        return StoreDecision(candidates[chosen].action, candidates[chosen], costs)

    def costs(
        self, tokens: int, candidates: Sequence[Candidate], tiers: Sequence[str]
    ) -> tuple[StoreCost, ...]:
        """Return what each candidate would cost; nothing if a speed that is needed is not known.

        A tier that was never read is left out, the first one excepted: without it nothing is decided.
        """
        known = [tier for tier in tiers if self.speeds.read_speed(tier) is not None]
        if not known or known[0] != tiers[0]:
            return ()
        shares = self.speeds.shares(known)
        found = [self._cost(tokens, candidate, shares) for candidate in candidates]
        costs = tuple(cost for cost in found if cost is not None)
        return costs if len(costs) == len(found) else ()

    def _cost(self, tokens: int, candidate: Candidate, shares: dict[str, float]) -> StoreCost | None:
        onboard_s, expected_s, recompute_s = [], 0.0, 0.0
        for tier, share in shares.items():
            nbytes = tokens * candidate.token_bytes
            estimates = estimate_onboard([Piece(tokens, nbytes, tier, candidate.encoder)], self.speeds)
            if estimates is None:
                return None
            recompute_s = estimates[0].recompute_s
            onboard_s.append(estimates[0].onboard_s)
            is_there = tier in candidate.tiers
            expected_s += share * (min(onboard_s[-1], recompute_s) if is_there else recompute_s)
        return StoreCost(onboard_s[0], expected_s, recompute_s)

    def _choose(
        self, worth: Sequence[int], candidates: Sequence[Candidate], costs: Sequence[StoreCost]
    ) -> int:
        """Return the gentlest plan that is about as fast as the fastest one, or raw if clearly faster.

        What is in use may be slower than the fastest plan by the whole margin, any other one by half of it:
        what has just been left does not come back by noise.
        """
        margin = self.settings.hysteresis
        plans = [index for index in worth if candidates[index].action != "raw"]
        raw = next((index for index in worth if candidates[index].action == "raw"), None)
        if not plans:
            return worth[0]
        fastest = min(costs[index].expected_s for index in plans)

        def is_near(index: int) -> bool:
            allowed = margin if candidates[index].encoder == self.current else margin / 2
            return costs[index].expected_s <= fastest * (1 + allowed)

        plan = next(index for index in plans if is_near(index))
        if raw is None:
            return plan
        needed = 1.0 if candidates[raw].encoder == self.current else 1 + margin
        return raw if costs[raw].expected_s * needed < costs[plan].expected_s else plan
