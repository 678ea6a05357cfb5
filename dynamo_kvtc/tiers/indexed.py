"""What the host tier and the disk tier share: index, pins, counters, write-once puts, checked gets."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from dynamo_kvtc.errors import (
    ObjectCorruptError,
    ObjectMissingError,
    TierClosedError,
    TierError,
    TierFullError,
)
from dynamo_kvtc.tiers.base import KEY_BYTES, OnChange, ReadRequest, Tier, TierKey, TierStats
from dynamo_kvtc.tiers.index import Location, ObjectIndex
from dynamo_kvtc.transfer import MemorySpan

__all__ = ["IndexedTier"]

# Objects that `clear` drops before it lets others use the event loop.
_CLEAR_BATCH = 256


class IndexedTier(Tier):
    """A tier whose index is in memory. Subclasses place, move and reclaim bytes.

    Parameters
    ----------
    name : str
        For messages and metrics.
    capacity_bytes : int
        Bytes that the tier may allocate, rounding and record headers included.
    """

    def __init__(self, name: str, capacity_bytes: int) -> None:
        self.name = name
        self._capacity_bytes = capacity_bytes
        self._index = ObjectIndex()
        self._loop = asyncio.get_running_loop()
        self._writing: set[TierKey] = set()
        self._pins: Counter[TierKey] = Counter()
        self._readers: Counter[TierKey] = Counter()
        self._dropped_while_read: dict[TierKey, Location] = {}
        self._closed = False
        self._on_change: OnChange | None = None
        self._lookups = self._hits = self._puts = self._evictions = 0
        self._bytes_written = self._bytes_read = 0
        self._rejected_full = self._corrupt_dropped = 0

    # --- for subclasses --------------------------------------------------------------------------

    @abstractmethod
    async def _store(self, key: TierKey, source: MemorySpan, timeout_s: float) -> Location:
        """Place and move an object's bytes; leaves nothing behind if it fails or is cancelled."""

    @abstractmethod
    async def _load(self, reads: Sequence[tuple[ReadRequest, Location]], timeout_s: float) -> None:
        """Move byte ranges of stored objects, known to lie within them."""

    @abstractmethod
    def _reclaim(self, location: Location) -> None:
        """Give back the room of an object that has left the index; must not block."""

    @abstractmethod
    def _space(self) -> tuple[int, int]:
        """Return the bytes allocated, and the largest object that would fit without evicting."""

    def _evict_one(self) -> bool:
        """Evict the least recently used object that may go; returns whether there was one.

        Objects that are preferred count as used when their turn comes, a bounded number of times.
        """
        spared = True
        while spared:
            spared = False
            for key in self._index.oldest_first():
                if not self._may_evict(key):
                    continue
                if not self._index.spare(key):
                    self._evict(key)
                    return True
                spared = True
        return False

    def _may_evict(self, key: TierKey) -> bool:
        """Return whether nobody uses a stored object; whoever asks evicts it then, without waiting."""
        return key not in self._pins and key not in self._readers

    def _evict(self, key: TierKey) -> None:
        self._reclaim(self._index.remove(key))
        self._evictions += 1
        self._tell(key, False)

    def _drop_corrupt(self, key: TierKey) -> None:
        """Make a damaged object invisible, pinned or not; its room follows when nobody reads it."""
        if key not in self._index:
            return
        location = self._index.remove(key)
        self._pins.pop(key, None)
        self._corrupt_dropped += 1
        self._tell(key, False)
        if key in self._readers:
            self._dropped_while_read[key] = location
        else:
            self._reclaim(location)

    def _tell(self, key: TierKey, stored: bool) -> None:
        if self._on_change is not None:
            self._on_change(key, stored)

    def _check_usable(self) -> None:
        if self._closed:
            raise TierClosedError(f"the {self.name} tier is closed")
        if asyncio.get_running_loop() is not self._loop:
            raise TierError(
                f"the {self.name} tier belongs to another event loop; call it from the one that opened it"
            )

    def _explain_closed(self, error: Exception | None) -> None:
        """Once the tier is closed, whatever comes of a call in progress is that it was closed."""
        if self._closed:
            raise TierClosedError(f"the {self.name} tier was closed during the call") from error

    # --- the contract ----------------------------------------------------------------------------

    async def contains_prefix(self, keys: Sequence[TierKey]) -> int:
        """Return how many leading `keys` are stored whole, and touch these."""
        self._check_usable()
        count = self._index.touch_prefix(keys)
        self._lookups += len(keys)
        self._hits += count
        return count

    def size_of(self, key: TierKey) -> int | None:
        """Return the stored size of an object in bytes, or None."""
        return self._index.size_of(key)

    async def put(self, key: TierKey, source: MemorySpan, *, timeout_s: float) -> bool:
        """Store an object; see `Tier.put`."""
        self._check_usable()
        if len(key) != KEY_BYTES or source.nbytes < 1:
            raise ValueError(
                f"a key has {KEY_BYTES} bytes and an object at least one: {len(key)}, {source.nbytes}"
            )
        if key in self._index or key in self._writing or key in self._dropped_while_read:
            return False
        self._writing.add(key)
        try:
            location = await self._store(key, source, timeout_s)
        except TierFullError:
            self._rejected_full += 1
            raise
        except Exception as error:
            self._explain_closed(error)
            raise
        finally:
            self._writing.discard(key)
        self._explain_closed(None)
        self._index.add(key, location)
        self._puts += 1
        self._bytes_written += source.nbytes
        self._tell(key, True)
        return True

    async def get(self, reads: Sequence[ReadRequest], *, timeout_s: float) -> None:
        """Move byte ranges of stored objects into registered memory; see `Tier.get`."""
        self._check_usable()
        located = [(read, self._locate(read)) for read in reads]
        if not located:
            return
        try:
            with self._reading({read.key for read in reads}):
                await self._load(located, timeout_s)
        except Exception as error:
            self._explain_closed(error)
            raise
        self._explain_closed(None)
        self._bytes_read += sum(read.into.nbytes for read in reads)

    def _locate(self, read: ReadRequest) -> Location:
        location = self._index.get(read.key)
        if location is None:
            raise ObjectMissingError(f"no object {read.key.hex()} in the {self.name} tier")
        if read.offset < 0:
            raise ValueError(f"cannot read from offset {read.offset}")
        end = read.offset + read.into.nbytes
        if end > location.nbytes:
            self._drop_corrupt(read.key)
            raise ObjectCorruptError(
                f"object {read.key.hex()} in the {self.name} tier has {location.nbytes} bytes, "
                f"its reader needs bytes up to {end}; it was dropped"
            )
        self._index.touch(read.key)
        return location

    @contextmanager
    def _reading(self, keys: set[TierKey]) -> Iterator[None]:
        self._readers.update(keys)
        try:
            yield
        finally:
            for key in keys:
                self._readers[key] -= 1
                if not self._readers[key]:
                    del self._readers[key]
                    dropped = self._dropped_while_read.pop(key, None)
                    if dropped is not None:
                        self._reclaim(dropped)

    def pin(self, keys: Iterable[TierKey]) -> list[TierKey]:
        """Protect stored objects from eviction; see `Tier.pin`."""
        pinned = [key for key in keys if key in self._index]
        self._pins.update(pinned)
        return pinned

    def unpin(self, keys: Iterable[TierKey]) -> None:
        """Undo `pin`; keys that are not pinned (any more) are ignored."""
        for key in keys:
            if self._pins[key] > 1:
                self._pins[key] -= 1
            else:
                del self._pins[key]

    def prefer(self, keys: Iterable[TierKey], times: int) -> None:
        """Let eviction pass over objects; see `Tier.prefer`."""
        for key in keys:
            if key in self._index:
                self._index.prefer(key, times)

    async def evict(self, keys: Iterable[TierKey]) -> int:
        """Drop objects; pinned ones and those being read stay."""
        self._check_usable()
        gone = [key for key in dict.fromkeys(keys) if key in self._index and self._may_evict(key)]
        for key in gone:
            self._evict(key)
        return len(gone)

    async def clear(self) -> None:
        """Drop every object that is not pinned or being read."""
        keys = list(self._index.oldest_first())
        for first in range(0, len(keys), _CLEAR_BATCH):
            await self.evict(keys[first : first + _CLEAR_BATCH])
            await asyncio.sleep(0)

    def watch(self, on_change: OnChange) -> None:
        """Report objects that come and go; see `Tier.watch`."""
        self._on_change = on_change

    def stats(self) -> TierStats:
        """Return the counters."""
        allocated, largest_free = self._space()
        return TierStats(
            objects=len(self._index),
            stored_bytes=self._index.stored_bytes,
            capacity_bytes=self._capacity_bytes,
            allocated_bytes=allocated,
            largest_free_bytes=largest_free,
            pinned_objects=len(self._pins),
            lookups=self._lookups,
            hits=self._hits,
            puts=self._puts,
            bytes_written=self._bytes_written,
            bytes_read=self._bytes_read,
            evictions=self._evictions,
            rejected_full=self._rejected_full,
            corrupt_dropped=self._corrupt_dropped,
        )
