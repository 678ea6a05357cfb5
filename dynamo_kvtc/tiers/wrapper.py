"""A tier around a tier."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dynamo_kvtc.tiers.base import OnChange, ReadRequest, Tier, TierKey, TierStats
from dynamo_kvtc.transfer import MemorySpan

__all__ = ["TierWrapper"]


class TierWrapper(Tier):
    """Hands every call on to another tier; subclass it to change some."""

    def __init__(self, inner: Tier) -> None:
        self.inner = inner
        self.name = inner.name

    @property
    def reads_into_device(self) -> bool:
        """See `Tier.reads_into_device`."""
        return self.inner.reads_into_device

    async def contains_prefix(self, keys: Sequence[TierKey]) -> int:
        """See `Tier.contains_prefix`."""
        return await self.inner.contains_prefix(keys)

    def size_of(self, key: TierKey) -> int | None:
        """See `Tier.size_of`."""
        return self.inner.size_of(key)

    async def put(self, key: TierKey, source: MemorySpan, *, timeout_s: float) -> bool:
        """See `Tier.put`."""
        return await self.inner.put(key, source, timeout_s=timeout_s)

    async def get(self, reads: Sequence[ReadRequest], *, timeout_s: float) -> None:
        """See `Tier.get`."""
        await self.inner.get(reads, timeout_s=timeout_s)

    def pin(self, keys: Iterable[TierKey]) -> list[TierKey]:
        """See `Tier.pin`."""
        return self.inner.pin(keys)

    def unpin(self, keys: Iterable[TierKey]) -> None:
        """See `Tier.unpin`."""
        self.inner.unpin(keys)

    def prefer(self, keys: Iterable[TierKey], times: int) -> None:
        """See `Tier.prefer`."""
        self.inner.prefer(keys, times)

    async def evict(self, keys: Iterable[TierKey]) -> int:
        """See `Tier.evict`."""
        return await self.inner.evict(keys)

    async def clear(self) -> None:
        """See `Tier.clear`."""
        await self.inner.clear()

    def watch(self, on_change: OnChange) -> None:
        """See `Tier.watch`."""
        self.inner.watch(on_change)

    def stats(self) -> TierStats:
        """See `Tier.stats`."""
        return self.inner.stats()

    async def close(self) -> None:
        """See `Tier.close`."""
        await self.inner.close()
