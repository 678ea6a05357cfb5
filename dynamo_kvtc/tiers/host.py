"""The host tier (G2): objects in one registered arena of host memory."""

from __future__ import annotations

from collections.abc import Sequence

from dynamo_kvtc.errors import TierFullError
from dynamo_kvtc.tiers.base import ReadRequest, TierKey
from dynamo_kvtc.tiers.index import Location
from dynamo_kvtc.tiers.indexed import IndexedTier
from dynamo_kvtc.transfer import MemoryRegion, MemorySpan, TransferAgent
from dynamo_kvtc.transfer.allocator import RangeAllocator

__all__ = ["HostTier"]

_ALIGNMENT = 64


class HostTier(IndexedTier):
    """Objects of any size in an arena; evicted bytes are free for the next object at once.

    The arena is allocated whole at `open` and its pages are taken as they are first written. Objects
    are not checksummed here: their readers check what they decode.
    """

    def __init__(self, agent: TransferAgent, arena: MemoryRegion, name: str) -> None:
        super().__init__(name, arena.nbytes)
        self._agent = agent
        self._arena = arena
        self._allocator = RangeAllocator(arena.nbytes, _ALIGNMENT)

    @classmethod
    async def open(cls, agent: TransferAgent, capacity_bytes: int, *, name: str = "host") -> HostTier:
        """Allocate and register an arena of `capacity_bytes` bytes.

        Raises
        ------
        TransferError
            If the memory cannot be had.
        """
        return cls(agent, await agent.allocate(capacity_bytes), name)

    async def _store(self, key: TierKey, source: MemorySpan, timeout_s: float) -> Location:
        place = self._make_room(source.nbytes)
        try:
            await self._agent.copy([(source, place)], timeout_s)
        except BaseException:
            self._agent.on_drained(place, lambda: self._allocator.free(place.offset, place.nbytes))
            raise
        return Location(0, place.offset, place.nbytes)

    def _make_room(self, nbytes: int) -> MemorySpan:
        """Allocate, evicting in order of age; because of fragmentation more than `nbytes` may have to go."""
        if nbytes > self._allocator.capacity:
            raise TierFullError(
                f"an object of {nbytes} bytes exceeds the {self.name} tier of {self._capacity_bytes} bytes"
            )
        while True:
            offset = self._allocator.allocate(nbytes)
            if offset is not None:
                return self._arena.span(offset, nbytes)
            if not self._evict_one():
                raise TierFullError(
                    f"no room for {nbytes} bytes in the {self.name} tier: what is left is pinned or in use"
                )

    async def _load(self, reads: Sequence[tuple[ReadRequest, Location]], timeout_s: float) -> None:
        pairs = [
            (self._arena.span(location.offset + read.offset, read.into.nbytes), read.into)
            for read, location in reads
        ]
        await self._agent.copy(pairs, timeout_s)

    def _reclaim(self, location: Location) -> None:
        self._allocator.free(location.offset, location.nbytes)

    def _space(self) -> tuple[int, int]:
        return self._allocator.allocated_bytes, self._allocator.largest_free_bytes

    async def close(self) -> None:
        """Release the arena; calls in progress fail. Idempotent."""
        if not self._closed:
            self._closed = True
            await self._agent.free(self._arena)
