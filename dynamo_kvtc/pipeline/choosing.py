"""What a sequence's tier blocks are stored with, and how far down: the policy's decision, carried out."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from dynamo_kvtc.observability import Counters
from dynamo_kvtc.pipeline.encoders import Encoder, Encoders
from dynamo_kvtc.policy import Candidate, StorePolicy
from dynamo_kvtc.tiers.stack import TierStack

__all__ = ["Choice", "Chooser"]

_log = logging.getLogger(__name__)

#: Of a tier's capacity, what raw blocks that were chosen by cost leave free: they use room that nobody needs
#: and never push compressed blocks out.
_LEFT_FREE = 0.5


@dataclass(frozen=True, slots=True)
class Choice:
    """An encoder, and into how many leading tiers its objects go; None: all."""

    encoder: Encoder
    depth: int | None = None


class Chooser:
    """Decides about sequences one by one; counts and logs each decision. Belongs to one event loop.

    Parameters
    ----------
    tier_block_tokens : int
        Tokens of a tier block.
    """

    def __init__(
        self,
        encoders: Encoders,
        policy: StorePolicy,
        tiers: TierStack,
        counters: Counters,
        tier_block_tokens: int,
    ) -> None:
        self._encoders, self._policy, self._tiers = encoders, policy, tiers
        self._counters, self._tokens = counters, tier_block_tokens
        self._names = tuple(tier.name for tier in tiers.tiers)

    def choose(self, wanted: int, of_sequence: int, pending: int = 0) -> Choice | None:
        """Decide about `wanted` of the `of_sequence` leading tier blocks of a sequence.

        Parameters
        ----------
        pending : int
            Tier blocks that wait to be encoded.

        Returns
        -------
        Choice or None
            None: they are not stored.
        """
        allowed = {encoder.name: encoder for encoder, _ in self._encoders.allowed()}
        decision = self._policy.decide(
            of_sequence * self._tokens, self._candidates(pending + wanted), self._names
        )
        self._counters.decided("offload", decision.action, wanted)
        chosen = decision.candidate
        if _log.isEnabledFor(logging.DEBUG):
            fields: dict[str, Any] = {"action": decision.action, "tier_blocks": wanted}
            fields |= {"of_sequence": of_sequence, "encoder": "none" if chosen is None else chosen.encoder}
            fields |= {
                "expected_s": " ".join(f"{cost.expected_s:.4f}" for cost in decision.costs) or "unknown"
            }
            _log.debug("offload", extra={"kvtc": fields})
        if chosen is None:
            return None
        depth = None if chosen.tiers == self._names else len(chosen.tiers)
        return Choice(allowed[chosen.encoder], depth)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for the status: what there is to choose from now, and what was chosen last."""
        return {
            "stores_with": self._policy.current or self._encoders.current.name,
            "candidates": [
                {
                    "encoder": one.encoder,
                    "action": one.action,
                    "token_bytes": one.token_bytes,
                    "tiers": list(one.tiers),
                }
                for one in self._candidates(1)
            ],
        }

    def _candidates(self, incoming: int) -> list[Candidate]:
        """What guard and operator allow; raw by cost only where `incoming` tier blocks find idle room."""
        allowed = self._encoders.allowed()
        candidates = []
        for index, (encoder, action) in enumerate(allowed):
            tiers = self._names
            if encoder.is_raw and index:
                tiers = self._idle(incoming * self._tokens * encoder.token_bytes)
            if tiers:
                nbytes = self._policy.speeds.token_bytes(encoder.name) or encoder.token_bytes
                candidates.append(Candidate(encoder.name, nbytes, tiers, action))
        return candidates

    def _idle(self, nbytes: float) -> tuple[str, ...]:
        """Return the leading tiers with so much room that nobody needs."""
        idle = []
        for tier in self._tiers.tiers:
            stats = tier.stats()
            if stats.allocated_bytes + nbytes > (1 - _LEFT_FREE) * stats.capacity_bytes:
                break
            idle.append(tier.name)
        return tuple(idle)
