"""The state of a tier adapter as plain values: what `status` prints and metrics are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from dynamo_kvtc import __version__
from dynamo_kvtc.observability import Snapshot
from dynamo_kvtc.tiers.base import TierStats

__all__ = ["AdapterStatus"]


@dataclass(frozen=True, slots=True)
class AdapterStatus:
    """What `TierAdapter.status` returns: the counters, each tier's own, and what is going on.

    Attributes
    ----------
    tiers : dict[str, TierStats]
        By the tier's name, from fast to slow.
    offloads_pending, offload_queue_limit : int
        Tier blocks that wait to be encoded, and how many may.
    onboards_active : int
        Onboards under way.
    promotions, failed_puts : int
        As `TierStack` counts them.
    artifact, speeds, guard, policy : Mapping
        What blocks are encoded with, `Speeds.to_dict`, the guard's status, the policy's settings and choice.
    """

    counters: Snapshot
    tiers: dict[str, TierStats]
    offloads_pending: int
    offload_queue_limit: int = 0
    onboards_active: int = 0
    promotions: int = 0
    failed_puts: int = 0
    artifact: Mapping[str, Any] = field(default_factory=dict)
    speeds: Mapping[str, Any] = field(default_factory=dict)
    guard: Mapping[str, Any] = field(default_factory=dict)
    policy: Mapping[str, Any] = field(default_factory=dict)
    version: str = __version__

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON and `metric_families`."""
        tiers = {name: asdict(stats) for name, stats in self.tiers.items()}
        plain = {name: getattr(self, name) for name in self.__slots__}
        return {**plain, "counters": self.counters.to_dict(), "tiers": tiers, "artifact": dict(self.artifact)}
