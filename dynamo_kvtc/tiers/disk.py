"""The disk tier (G3): objects in segment files with an append log, written and read by NIXL.

How an object gets there: room is made by evicting, the range is allocated at the log's end (so that a full
disk shows before anything is written), the bytes go out by NIXL, then the record's header is written. A
crash before the header leaves no object; the range is given back at the next open. A crash after it
leaves the whole object, unless the machine itself went down: then, with ``durability="none"``, bytes may be
missing under a header that survived, which the checksum tells when the object is read. With
``durability="fsync"`` an object that `put` reported as stored survives a power failure.

Eviction punches the record out of its segment, so the space is the file system's again at once; a
segment without objects is deleted. Recency is not kept across restarts: objects come back in the order in
which they were written.

What is verified when: record headers at open; an object's checksum when the whole of it is read. Reads of
parts rely on the checksums inside the object.
"""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import xxhash

from dynamo_kvtc.blocking import run_to_end
from dynamo_kvtc.errors import ObjectCorruptError, TierFullError, TransferError, TransferTimeoutError
from dynamo_kvtc.tiers.base import ReadRequest, TierKey
from dynamo_kvtc.tiers.disk_files import lock_folder
from dynamo_kvtc.tiers.disk_format import BLOCK_BYTES
from dynamo_kvtc.tiers.disk_log import Segment, SegmentLog
from dynamo_kvtc.tiers.disk_recovery import Recovery, recover_folder
from dynamo_kvtc.tiers.index import Location
from dynamo_kvtc.tiers.indexed import IndexedTier
from dynamo_kvtc.transfer import MemorySpan, TransferAgent

__all__ = ["DiskSettings", "DiskTier"]

#: Segments that fill the capacity when all are full. Twice as many may be open, with two descriptors each.
_FULL_SEGMENTS = 128

_CLOSE_TIMEOUT_S = 5.0

# What a file system answers when an object does not fit: full, over quota, beyond the file size limit.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class DiskSettings:
    """How a disk tier keeps its objects.

    Attributes
    ----------
    segment_bytes : int
        Size of a segment file; larger ones are used where the capacity would need more than 128 of them.
    durability : str
        ``"none"``: objects survive the process, not surely a power failure. ``"fsync"``: what `put`
        reported as stored survives a power failure.
    verify_at_open : str
        ``"headers"``: one small read per object. ``"objects"``: read everything, drop what is damaged.
    """

    segment_bytes: int = 256 << 20
    durability: Literal["none", "fsync"] = "none"
    verify_at_open: Literal["headers", "objects"] = "headers"

    def __post_init__(self) -> None:
        if self.segment_bytes < 2 * BLOCK_BYTES:
            raise ValueError(f"segment_bytes must be at least {2 * BLOCK_BYTES}, not {self.segment_bytes}")
        if self.durability not in ("none", "fsync") or self.verify_at_open not in ("headers", "objects"):
            raise ValueError(f"unknown durability or verify_at_open: {self}")


class DiskTier(IndexedTier):
    """Objects in a folder that this process alone uses. Make one with `open`."""

    def __init__(
        self,
        agent: TransferAgent,
        folder: Path,
        capacity_bytes: int,
        settings: DiskSettings,
        name: str,
        lock: int,
    ) -> None:
        super().__init__(name, capacity_bytes)
        self._agent = agent
        self._folder = folder
        self._lock = lock
        segment_bytes = max(settings.segment_bytes, capacity_bytes // _FULL_SEGMENTS)
        self._max_segments = max(4, 2 * capacity_bytes // segment_bytes)
        self._log = SegmentLog(agent, folder, segment_bytes, fsync=settings.durability == "fsync")

    @classmethod
    async def open(
        cls,
        agent: TransferAgent,
        folder: str | os.PathLike[str],
        capacity_bytes: int,
        *,
        settings: DiskSettings | None = None,
        name: str = "disk",
    ) -> DiskTier:
        """Lock a folder (made if missing), recover its objects, and serve them.

        What exceeds the capacity is evicted, oldest first. Damaged records are dropped and counted in
        `TierStats.corrupt_dropped`.

        Raises
        ------
        TierError
            If the folder cannot be used, is in use, or holds segments that cannot be read.
        """
        settings = settings or DiskSettings()
        path = Path(folder)
        verify = settings.verify_at_open == "objects"
        lock = await run_to_end(None, partial(lock_folder, path), os.close)
        tier = cls(agent, path, capacity_bytes, settings, name, lock)
        try:
            # To its end: it tidies the folder, which is another's as soon as the lock is given up.
            await tier._adopt(await run_to_end(None, partial(recover_folder, path, verify_objects=verify)))
        except BaseException:
            await tier.close()
            raise
        return tier

    async def _adopt(self, recovery: Recovery) -> None:
        self._corrupt_dropped = recovery.damaged
        for segment in recovery.segments:
            await self._log.adopt(segment.path, segment.header, segment.records)
            for record in segment.records:
                self._index.add(
                    record.key, Location(segment.header.serial, record.offset, record.nbytes, record.checksum)
                )
        while self._log.allocated_bytes > self._capacity_bytes and self._evict_one():
            pass

    # --- storing ---------------------------------------------------------------------------------

    async def _store(self, key: TierKey, source: MemorySpan, timeout_s: float) -> Location:
        deadline = time.monotonic() + timeout_s
        try:
            await self._bound_segments(source.nbytes, deadline)
            self._make_room(source.nbytes)
            segment, offset = await self._log.reserve(source.nbytes, _left(deadline))
            try:
                await self._agent.write_file([(source, segment.span(offset, source.nbytes))], _left(deadline))
                checksum = await self._log.commit(segment, offset, key, source.view, _left(deadline))
            except BaseException:
                self._log.release(segment, offset, source.nbytes)
                raise
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise TierFullError(
                    f"the file system of {self._folder} has no room for {source.nbytes} bytes: "
                    f"{error.strerror}; free some, or lower the {self.name} tier's capacity"
                ) from error
            raise TransferError(f"cannot write below {self._folder}: {error}") from error
        return Location(segment.header.serial, offset, source.nbytes, checksum)

    def _make_room(self, nbytes: int) -> None:
        needed = self._log.bytes_needed(nbytes)
        # One block more: a segment that is empty but used up goes only when the next one is there.
        if needed + BLOCK_BYTES > self._capacity_bytes:
            raise TierFullError(
                f"an object of {nbytes} bytes exceeds the {self.name} tier of {self._capacity_bytes} bytes"
            )
        while self._log.allocated_bytes + needed > self._capacity_bytes:
            if not self._evict_one():
                raise TierFullError(
                    f"no room for {nbytes} bytes in the {self.name} tier: what is left is pinned or in use"
                )

    async def _bound_segments(self, nbytes: int, deadline: float) -> None:
        """Evict what is left of the sparsest segment if another one is needed and there are too many.

        Objects that are used again and again can keep almost empty segments alive, each of which costs a
        file descriptor.
        """
        if len(self._log) < self._max_segments or self._log.has_room(nbytes):
            return
        segment = self._log.sparsest_sealed()
        scan = None if segment is None else await self._log.scan(segment, _left(deadline))
        if scan is None:
            return
        for record in scan.records:
            location = self._index.get(record.key)
            if location is not None and (location.segment, location.offset) == (
                scan.header.serial,
                record.offset,
            ):
                await self.evict([record.key])

    # --- reading ---------------------------------------------------------------------------------

    @property
    def reads_into_device(self) -> bool:
        """True, as far as the agent moves files there; wholes are not verified then."""
        return True

    async def _load(self, reads: Sequence[tuple[ReadRequest, Location]], timeout_s: float) -> None:
        pairs = [
            (self._log[location.segment].span(location.offset + read.offset, read.into.nbytes), read.into)
            for read, location in reads
        ]
        try:
            await self._agent.read_file(pairs, timeout_s)
        except TransferTimeoutError:
            raise
        except TransferError as error:
            await self._blame_truncated(reads, error)
            raise
        whole = [
            (read, location)
            for read, location in reads
            if read.into.nbytes == location.nbytes and not read.into.region.on_device
        ]
        damaged = await asyncio.to_thread(_damaged, whole) if whole else []
        for read in damaged:
            self._drop_corrupt(read.key)
        if damaged:
            raise ObjectCorruptError(
                f"{len(damaged)} objects in the {self.name} tier fail their checksum "
                f"({damaged[0].key.hex()} and so on); they were dropped"
            )

    async def _blame_truncated(
        self, reads: Sequence[tuple[ReadRequest, Location]], error: TransferError
    ) -> None:
        """Drop objects that reach beyond the end of their file, which something else has cut short."""
        segments = {location.segment: self._log[location.segment] for _, location in reads}
        sizes = await self._log.run(
            lambda: {s: _file_size(segment) for s, segment in segments.items()}, _CLOSE_TIMEOUT_S
        )
        cut = [
            read for read, location in reads if location.offset + location.nbytes > sizes[location.segment]
        ]
        for read in cut:
            self._drop_corrupt(read.key)
        if cut:
            raise ObjectCorruptError(
                f"{len(cut)} objects in the {self.name} tier lie beyond the end of their segment; "
                f"they were dropped"
            ) from error

    # --- the rest --------------------------------------------------------------------------------

    def _reclaim(self, location: Location) -> None:
        self._log.release(self._log[location.segment], location.offset, location.nbytes)

    def _space(self) -> tuple[int, int]:
        allocated = self._log.allocated_bytes
        return allocated, max(0, self._capacity_bytes - allocated)

    async def close(self) -> None:
        """Close the files and give up the lock; the objects stay on disk. Idempotent."""
        if self._closed:
            return
        self._closed = True
        # The lock goes when nothing of this tier can touch the folder any more.
        await self._log.close(_CLOSE_TIMEOUT_S, lambda: os.close(self._lock))


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TransferTimeoutError("the deadline of a put passed before its bytes were written")
    return left


def _damaged(reads: Sequence[tuple[ReadRequest, Location]]) -> list[ReadRequest]:
    return [read for read, location in reads if xxhash.xxh3_64_intdigest(read.into.view) != location.checksum]


def _file_size(segment: Segment) -> int:
    return os.fstat(segment.fd).st_size
