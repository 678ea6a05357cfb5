"""The segments of a disk tier: an append log that gives room back behind it.

Keeps account of space on the event loop; every blocking file system call runs in one thread of its own,
in the order in which it was asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeGuard, TypeVar

import xxhash

from dynamo_kvtc.errors import TierClosedError, TransferTimeoutError
from dynamo_kvtc.tiers.base import TierKey
from dynamo_kvtc.tiers.disk_files import allocate_range, punch_hole, sync_folder
from dynamo_kvtc.tiers.disk_format import (
    BLOCK_BYTES,
    RECORD_HEADER_BYTES,
    Record,
    SegmentHeader,
    SegmentScan,
    record_bytes,
    record_header,
    scan_segment,
    segment_header,
    segment_name,
)
from dynamo_kvtc.transfer import FileRegion, FileSpan, TransferAgent

__all__ = ["Segment", "SegmentLog"]

T = TypeVar("T")

_log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Segment:
    """One open segment file.

    Attributes
    ----------
    file : FileRegion
        NIXL's descriptor of the file.
    fd : int
        The log's own descriptor, used and closed in the log's thread only, so that no call of that thread
        can meet a number that has been given to another file.
    end : int
        Where the next record goes.
    live_bytes : int
        Bytes of its records, and of those being written.
    live_records : int
        How many these are; a sealed segment without any is deleted.
    holes : deque[tuple[int, int]]
        Ranges ``(start, stop)`` that are to be punched out.
    """

    header: SegmentHeader
    path: Path
    file: FileRegion
    fd: int
    end: int
    live_bytes: int = 0
    live_records: int = 0
    holes: deque[tuple[int, int]] = field(default_factory=deque)

    def span(self, offset: int, nbytes: int) -> FileSpan:
        """Return a span of the segment's file."""
        return self.file.span(offset, nbytes)


class SegmentLog:
    """Appends records to segments and takes them away. Made by the disk tier, after recovery.

    Parameters
    ----------
    segment_bytes : int
        Size at which a segment is sealed and the next one begun.
    """

    def __init__(self, agent: TransferAgent, folder: Path, segment_bytes: int, *, fsync: bool) -> None:
        self._agent = agent
        self._folder = folder
        self._segment_bytes = segment_bytes
        self._fsync = fsync
        self._segments: dict[int, Segment] = {}
        self._active: Segment | None = None
        self._opening: asyncio.Task[None] | None = None
        self._closing = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kvtc-disk")
        self._next_serial = 0
        self._closing_files: set[asyncio.Task[None]] = set()
        self.allocated_bytes = 0
        #: Called in the log's thread before room is given back, for whoever must be told first.
        self.before_giving_back: Callable[[], None] = lambda: None

    def __len__(self) -> int:
        return len(self._segments)

    def __getitem__(self, serial: int) -> Segment:
        return self._segments[serial]

    async def run(self, function: Callable[[], T], timeout_s: float | None) -> T:
        """Run a blocking call in the log's thread, after all earlier ones.

        Raises
        ------
        TransferTimeoutError
            If it did not end in time; it goes on in its thread.
        TierClosedError
            After `close`.
        """
        if self._closing:
            raise TierClosedError(f"the disk tier in {self._folder} is closed")
        return await self._in_thread(function, timeout_s)

    async def _in_thread(self, function: Callable[[], T], timeout_s: float | None) -> T:
        future = asyncio.get_running_loop().run_in_executor(self._thread, function)
        future.add_done_callback(_retrieve)
        done, _ = await asyncio.wait({future}, timeout=timeout_s)
        if not done:
            raise TransferTimeoutError(f"the file system below {self._folder} did not answer in time")
        return future.result()

    def bytes_needed(self, nbytes: int) -> int:
        """Return what storing an object of `nbytes` bytes adds to `allocated_bytes`, at most."""
        return record_bytes(nbytes) + BLOCK_BYTES

    def has_room(self, nbytes: int) -> bool:
        """Return whether an object of `nbytes` bytes fits into the segment being written."""
        return self._fits(self._active, record_bytes(nbytes))

    @staticmethod
    def _fits(segment: Segment | None, size: int) -> TypeGuard[Segment]:
        return segment is not None and segment.end + size <= segment.file.nbytes

    async def adopt(self, path: Path, header: SegmentHeader, records: list[Record]) -> None:
        """Take over a segment that recovery has found and tidied; call in order of age."""
        end = records[-1].stop
        file = await self._agent.open_file(path, nbytes=max(self._segment_bytes, end))
        segment = Segment(header, path, file, os.dup(file.fd), end)
        self._segments[header.serial] = segment
        self._next_serial = header.serial + 1
        self._active = segment if end < self._segment_bytes else None
        self.allocated_bytes += BLOCK_BYTES
        segment.live_records = len(records)
        segment.live_bytes = sum(record_bytes(record.nbytes) for record in records)
        self.allocated_bytes += segment.live_bytes

    # --- storing ---------------------------------------------------------------------------------

    async def reserve(self, nbytes: int, timeout_s: float) -> tuple[Segment, int]:
        """Append room for an object's record; end with `commit` or `release`.

        Returns
        -------
        tuple
            The segment, and where in it the object's own bytes begin.

        Raises
        ------
        OSError
            If the disk is full or fails; nothing is reserved then.
        """
        size = record_bytes(nbytes)
        # Accounted for before the first wait, so that concurrent puts cannot both take the last room.
        self.allocated_bytes += size
        try:
            segment = await self._segment_with_room(size, timeout_s)
        except BaseException:
            self.allocated_bytes -= size
            raise
        start = segment.end
        segment.end += size
        segment.live_records += 1
        segment.live_bytes += size
        try:
            await self.run(lambda: allocate_range(segment.fd, start, size), timeout_s)
        except BaseException:
            self.release(segment, start + RECORD_HEADER_BYTES, nbytes)
            raise
        return segment, start + RECORD_HEADER_BYTES

    async def commit(
        self, segment: Segment, offset: int, key: TierKey, data: memoryview, timeout_s: float
    ) -> int:
        """Write the header of a record whose bytes are written: from then on the object exists on disk.

        Parameters
        ----------
        data : memoryview
            The object's bytes, to take their checksum.

        Returns
        -------
        int
            The checksum.

        Raises
        ------
        OSError, TransferTimeoutError
            If that fails; `release` the record then.
        """
        fd = segment.fd

        def write() -> int:
            checksum = xxhash.xxh3_64_intdigest(data)
            header = record_header(segment.header, key, len(data), checksum)
            if self._fsync:
                os.fdatasync(fd)
            os.pwrite(fd, header, offset - RECORD_HEADER_BYTES)
            if self._fsync:
                os.fdatasync(fd)
            return checksum

        return await self.run(write, timeout_s)

    async def _segment_with_room(self, size: int, timeout_s: float) -> Segment:
        deadline = time.monotonic() + timeout_s
        while not self._fits(self._active, size):
            if self._opening is None or self._opening.done():
                # A task of its own: a cancelled put must not leave a half-made segment behind.
                self._opening = asyncio.get_running_loop().create_task(self._begin_segment(size))
                self._opening.add_done_callback(_retrieve)
            opening = self._opening
            await asyncio.wait({opening}, timeout=max(0.0, deadline - time.monotonic()))
            if not opening.done():
                raise TransferTimeoutError(f"could not begin a segment below {self._folder} in time")
            opening.result()
        return self._active

    async def _begin_segment(self, record_size: int) -> None:
        header = SegmentHeader(self._next_serial, secrets.token_bytes(16))
        self._next_serial += 1
        path = self._folder / segment_name(header.serial)
        fd = await self.run(lambda: create_segment(path, header, fsync=self._fsync), None)
        limit = max(self._segment_bytes, BLOCK_BYTES + record_size)
        nixl_fd = os.dup(fd)
        try:
            file = await self._agent.register_file(nixl_fd, limit, name=path.name, owns_fd=True)
        except BaseException:
            os.close(nixl_fd)
            os.close(fd)
            self.in_background(path.unlink)
            raise
        if self._closing:
            os.close(fd)
            await self._agent.close_file(file)
            raise TierClosedError(f"the disk tier in {self._folder} is closed")
        segment = Segment(header, path, file, fd, BLOCK_BYTES)
        self._segments[header.serial] = segment
        self.allocated_bytes += BLOCK_BYTES
        sealed, self._active = self._active, segment
        if sealed is not None:
            self._delete_if_empty(sealed)

    # --- giving room back ------------------------------------------------------------------------

    def release(self, segment: Segment, offset: int, nbytes: int) -> None:
        """Take a record away, once no abandoned transfer can write into it any more. Does not block."""
        start, size = offset - RECORD_HEADER_BYTES, record_bytes(nbytes)
        segment.live_bytes -= size
        segment.live_records -= 1
        self.allocated_bytes -= size

        def give_back() -> None:
            if not self._delete_if_empty(segment):
                segment.holes.append((start, start + size))
                if len(segment.holes) == 1:
                    self.in_background(lambda: self._punch(segment))

        self._agent.on_drained(segment.span(start, size), give_back)

    def _delete_if_empty(self, segment: Segment) -> bool:
        if segment is self._active or segment.live_records or segment.header.serial not in self._segments:
            return False
        del self._segments[segment.header.serial]
        self.allocated_bytes -= BLOCK_BYTES
        segment.holes.clear()
        self.in_background(lambda: self._remove(segment))
        task = asyncio.get_running_loop().create_task(self._agent.close_file(segment.file))
        self._closing_files.add(task)
        task.add_done_callback(self._closing_files.discard)
        return True

    def in_background(self, function: Callable[[], None]) -> None:
        """Run a blocking call in the log's thread, after all earlier ones; its failure is logged only."""
        if self._closing:
            return

        def guarded() -> None:
            try:
                function()
            except OSError as error:
                # The room is found again at the next open, or goes with the segment.
                _log.warning("could not give disk space back below %s: %s", self._folder, error)

        self._thread.submit(guarded)

    def _punch(self, segment: Segment) -> None:
        """Punch out a segment's holes, neighbouring ones together. Blocking."""
        holes = []
        with contextlib.suppress(IndexError):
            while True:
                holes.append(segment.holes.popleft())
        self.before_giving_back()
        merged: list[list[int]] = []
        for start, stop in sorted(holes):
            if merged and merged[-1][1] == start:
                merged[-1][1] = stop
            else:
                merged.append([start, stop])
        for start, stop in merged:
            punch_hole(segment.fd, start, stop - start)

    def _remove(self, segment: Segment) -> None:
        """Delete a segment's file. Blocking."""
        self.before_giving_back()
        try:
            # Before its locks go with the descriptor: who can lock a record knows by then that it is gone.
            segment.path.unlink(missing_ok=True)
        finally:
            os.close(segment.fd)

    def sparsest_sealed(self) -> Segment | None:
        """Return the sealed segment with the fewest live bytes, or None."""
        sealed = [segment for segment in self._segments.values() if segment is not self._active]
        return min(sealed, key=lambda segment: segment.live_bytes, default=None)

    async def scan(self, segment: Segment, timeout_s: float) -> SegmentScan | None:
        """Read a segment's record headers again."""
        return await self.run(lambda: scan_segment(segment.fd), timeout_s)

    async def close(self, timeout_s: float, last: Callable[[], None]) -> None:
        """Close the files; what is on disk stays.

        Parameters
        ----------
        timeout_s : float
            How long to wait for the log's thread to end what it was asked to do; it goes on beyond that.
        last : Callable
            What the thread does at the very end.
        """
        self._closing = True
        segments = list(self._segments.values())
        self._segments.clear()

        def finish() -> None:
            for segment in segments:
                os.close(segment.fd)
            last()

        with contextlib.suppress(TransferTimeoutError):
            await self._in_thread(finish, timeout_s)
        self._thread.shutdown(wait=False)
        for segment in segments:
            await self._agent.close_file(segment.file)
        if self._closing_files:
            await asyncio.wait(self._closing_files, timeout=timeout_s)


def create_segment(path: Path, header: SegmentHeader, *, fsync: bool) -> int:
    """Create a segment file with its header and return its descriptor. Blocking; all or nothing."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        allocate_range(fd, 0, BLOCK_BYTES)
        os.pwrite(fd, segment_header(header), 0)
        if fsync:
            os.fsync(fd)
            sync_folder(path.parent)
    except BaseException:
        os.close(fd)
        path.unlink()
        raise
    return fd


def _retrieve(future: asyncio.Future[T]) -> None:
    # A call whose waiter has gone may fail too; its error has nobody to go to.
    if not future.cancelled():
        future.exception()
