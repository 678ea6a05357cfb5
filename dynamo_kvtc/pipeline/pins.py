"""Prefixes that a host has pinned: kept until it lets them go, within a share of each tier."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from dynamo_kvtc.tiers.base import TierKey
from dynamo_kvtc.tiers.stack import TierStack

__all__ = ["Pins"]


class Pins:
    """Pinned prefixes. Belongs to one event loop.

    Parameters
    ----------
    share : float
        How much of the largest tier pinned objects may take: what is pinned cannot make room for others.
    """

    def __init__(self, tiers: TierStack, share: float = 0.5) -> None:
        self._tiers, self._share = tiers, share
        self._held: Counter[TierKey] = Counter()
        self._sizes: dict[TierKey, int] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the pinned objects."""
        return sum(self._sizes.values())

    def pin(self, keys: Sequence[TierKey]) -> int:
        """Pin the leading objects that are stored and fit into the share; returns how many.

        An object that is pinned twice must be let go twice.
        """
        most = self._share * max(stats.capacity_bytes for stats in self._tiers.stats().values())
        used = self.nbytes
        for count, key in enumerate(keys):
            size = self._tiers.size_of(key)
            if size is None:
                return count
            used += 0 if key in self._sizes else size
            if used > most or not self._tiers.pin([key]):
                return count
            self._held[key] += 1
            self._sizes[key] = size
        return len(keys)

    def unpin(self, keys: Sequence[TierKey]) -> int:
        """Let go of objects; those that are not pinned are left out. Returns how many were."""
        held = [key for key in keys if self._held[key] > 0]
        self._tiers.unpin(held)
        for key in held:
            self._held[key] -= 1
            if not self._held[key]:
                del self._held[key], self._sizes[key]
        return len(held)
