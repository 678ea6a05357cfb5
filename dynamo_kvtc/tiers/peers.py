"""What other workers have stored in a shared folder: followed by their journals, read under locks.

Nothing here writes. An object is read under a lock on its range of the segment, which its writer takes for
itself before it gives the range back; so what is being read or pinned stays, and the lock goes with this
process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import xxhash

from dynamo_kvtc.deadline import in_time
from dynamo_kvtc.errors import (
    ObjectCorruptError,
    ObjectMissingError,
    TransferError,
    TransferTimeoutError,
)
from dynamo_kvtc.tiers.base import ReadRequest, TierKey
from dynamo_kvtc.tiers.disk_format import (
    RECORD_HEADER_BYTES,
    WRITER_PREFIX,
    record_in_place,
    segment_name,
)
from dynamo_kvtc.tiers.index import Location
from dynamo_kvtc.tiers.journal import JournalReader
from dynamo_kvtc.tiers.range_locks import lock_range, unlock_range
from dynamo_kvtc.transfer import FileRegion, TransferAgent

__all__ = ["Peers"]

T = TypeVar("T")

# Segments of others that are kept open, as far as nothing in them is in use.
_MAX_OPEN_FILES = 128

# Spans of a registered file must lie within the size it was registered with; those of others grow.
_FILE_BYTES = 1 << 50

_CLOSE_TIMEOUT_S = 5.0


@dataclass(eq=False, slots=True)
class _Peer:
    folder: Path
    journal: JournalReader
    #: Objects that turned out damaged or gone, until the journal is written anew.
    refused: set[TierKey] = field(default_factory=set)
    generation: int = 0
    files: dict[int, FileRegion] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Found:
    peer: _Peer
    location: Location


class Peers:
    """The objects of all other workers in a folder. Lives on the tier's loop.

    Parameters
    ----------
    folder : Path
        The shared folder.
    own : str
        Name of this worker's own folder in it.
    """

    def __init__(self, agent: TransferAgent, folder: Path, own: str) -> None:
        self._agent, self._folder, self._own = agent, folder, own
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kvtc-peers")
        self._peers: dict[str, _Peer] = {}
        self._refreshing = asyncio.Lock()
        self._seen_at = float("-inf")
        self._recent: OrderedDict[tuple[_Peer, int], None] = OrderedDict()
        # Uses of each object whose range is locked, by pins and reads together.
        self._held: Counter[TierKey] = Counter()
        self._held_at: dict[TierKey, tuple[FileRegion, Location]] = {}
        self._opening: dict[tuple[_Peer, int], asyncio.Task[FileRegion]] = {}
        # Files that are to be closed once nothing in them is in use, and those being closed.
        self._retired: set[FileRegion] = set()
        self._closing: set[asyncio.Task[None]] = set()

    def find(self, key: TierKey) -> _Found | None:
        """Return where another worker has stored an object, or None."""
        for peer in self._peers.values():
            location = peer.journal.objects.get(key)
            if location is not None and key not in peer.refused:
                return _Found(peer, location)
        return None

    def forget(self, key: TierKey) -> bool:
        """Treat an object of others as absent, unless it is in use; returns whether there was one."""
        found = self.find(key)
        if found is None or key in self._held:
            return False
        found.peer.refused.add(key)
        return True

    # --- following ---------------------------------------------------------------------------------

    async def refresh(self, timeout_s: float, *, max_age_s: float = 0.0) -> None:
        """See what others have stored up to now, or up to `max_age_s` ago.

        Raises
        ------
        TransferTimeoutError
            If the folder cannot be read in time.
        """
        not_before = time.monotonic() - max_age_s
        try:
            await in_time(self._refresh(not_before), timeout_s)
        except asyncio.TimeoutError:
            raise TransferTimeoutError(f"the folder {self._folder} did not answer in time") from None

    async def _refresh(self, not_before: float) -> None:
        async with self._refreshing:
            if self._seen_at >= not_before:
                return
            begun = time.monotonic()
            await asyncio.get_running_loop().run_in_executor(self._thread, self._poll)
            self._seen_at = begun
        there = set(self._peers.values())
        for peer in there | {peer for peer, _ in self._recent}:
            if peer not in there or peer.generation != peer.journal.generation:
                # The folder is gone, or was opened anew: files of the same name may be others now.
                peer.generation = peer.journal.generation
                peer.refused.clear()
                for serial in list(peer.files):
                    self._retire(peer, serial)

    def _poll(self) -> None:
        """Look for writers and read what is new in their journals. Blocking."""
        with contextlib.suppress(OSError), os.scandir(self._folder) as entries:
            names = {entry.name for entry in entries if entry.name.startswith(WRITER_PREFIX)} - {self._own}
            peers = dict(self._peers)
            for name in names - peers.keys():
                peers[name] = _Peer(self._folder / name, JournalReader(self._folder / name))
            for name, peer in list(peers.items()):
                try:
                    peer.journal.poll()
                except OSError:
                    if name not in names:
                        del peers[name]
            self._peers = peers

    # --- files ---------------------------------------------------------------------------------------

    async def prepare(self, keys: Sequence[TierKey], timeout_s: float) -> None:
        """Open the segments of objects that will be pinned or read, as far as that goes in time."""
        deadline = time.monotonic() + timeout_s
        with contextlib.suppress(TransferTimeoutError):
            for key in keys:
                if (found := self.find(key)) is not None:
                    await self._open(key, found, deadline)

    async def _open(self, key: TierKey, found: _Found, deadline: float) -> bool:
        """See that the segment of an object is open; one that is gone takes its object along."""
        peer, serial = found.peer, found.location.segment
        place = peer, serial
        if serial not in peer.files:
            if place not in self._opening:
                # A task of its own: whoever waits for it may be cancelled, and others may wait too.
                self._opening[place] = asyncio.get_running_loop().create_task(self._open_file(peer, serial))
            opening = self._opening[place]
            await asyncio.wait({opening}, timeout=max(0.0, deadline - time.monotonic()))
            if not opening.done():
                raise TransferTimeoutError(f"a segment in {peer.folder} could not be opened in time")
            if (error := opening.exception()) is not None:
                if not isinstance(error, OSError):
                    raise error
                peer.refused.add(key)
                return False
        if place in self._recent:
            self._recent.move_to_end(place)
        return True

    async def _open_file(self, peer: _Peer, serial: int) -> FileRegion:
        try:
            path = peer.folder / segment_name(serial)
            region = await self._agent.open_file(path, nbytes=_FILE_BYTES, flags=os.O_RDONLY)
        finally:
            del self._opening[(peer, serial)]
        peer.files[serial] = region
        self._recent[(peer, serial)] = None
        if len(self._recent) > _MAX_OPEN_FILES:
            in_use = {file for file, _ in self._held_at.values()}
            idle = (place for place in self._recent if place[0].files.get(place[1]) not in in_use)
            if (oldest := next(idle, None)) is not None:
                self._retire(*oldest)
        return region

    def _retire(self, peer: _Peer, serial: int) -> None:
        """Close a file, at once or when nothing in it is in use any more."""
        self._recent.pop((peer, serial), None)
        region = peer.files.pop(serial, None)
        if region is not None:
            self._retired.add(region)
            self._close_idle(region)

    def _close_idle(self, region: FileRegion) -> None:
        if region in self._retired and all(file is not region for file, _ in self._held_at.values()):
            self._retired.discard(region)
            task = asyncio.get_running_loop().create_task(self._agent.close_file(region))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    # --- using ---------------------------------------------------------------------------------------

    def hold(self, key: TierKey) -> bool:
        """Keep an object from being evicted by its writer, if its segment is open; end with `let_go`."""
        if key not in self._held:
            found = self.find(key)
            region = None if found is None else found.peer.files.get(found.location.segment)
            if found is None or region is None:
                return False
            location = found.location
            if not _lock_stored(region.fd, location.offset - RECORD_HEADER_BYTES):
                found.peer.refused.add(key)
                return False
            self._held_at[key] = region, location
        self._held[key] += 1
        return True

    def let_go(self, key: TierKey) -> bool:
        """Undo `hold`; returns whether it was held."""
        if key not in self._held:
            return False
        self._held[key] -= 1
        if not self._held[key]:
            del self._held[key]
            region, location = self._held_at.pop(key)
            if region.registration is not None:
                unlock_range(region.fd, location.offset - RECORD_HEADER_BYTES, 1)
            self._close_idle(region)
        return True

    async def get(self, reads: Sequence[ReadRequest], *, timeout_s: float) -> None:
        """Read ranges of objects of others; raises as `Tier.get` does."""
        if not reads:
            return
        deadline = time.monotonic() + timeout_s
        held: list[TierKey] = []
        try:
            for key in dict.fromkeys(read.key for read in reads):
                found = self.find(key)
                if found is None or not await self._open(key, found, deadline) or not self.hold(key):
                    raise ObjectMissingError(f"no object {key.hex()} of another worker in {self._folder}")
                held.append(key)
            placed = [(read, *self._held_at[read.key]) for read in reads]
            for read, _, location in placed:
                if read.offset + read.into.nbytes > location.nbytes:
                    self._refuse(read.key)
                    raise ObjectCorruptError(
                        f"object {read.key.hex()} has {location.nbytes} bytes, its reader needs more"
                    )
            gone = await self._in_thread(partial(_not_in_place, placed), deadline)
            for key in gone:
                self._refuse(key)
            if gone:
                raise ObjectMissingError(f"{len(gone)} objects of other workers are gone")
            pairs = [
                (file.span(at.offset + read.offset, read.into.nbytes), read.into) for read, file, at in placed
            ]
            await self._agent.read_file(pairs, deadline - time.monotonic())
            damaged = await self._in_thread(partial(_damaged, placed), deadline)
            for key in damaged:
                self._refuse(key)
            if damaged:
                raise ObjectCorruptError(f"{len(damaged)} objects of other workers fail their checksum")
        except OSError as error:
            raise TransferError(f"cannot read below {self._folder}: {error}") from error
        finally:
            for key in held:
                self.let_go(key)

    async def _in_thread(self, function: Callable[[], T], deadline: float) -> T:
        future = asyncio.get_running_loop().run_in_executor(self._thread, function)
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        done, _ = await asyncio.wait({future}, timeout=max(0.0, deadline - time.monotonic()))
        if not done:
            raise TransferTimeoutError(f"the folder {self._folder} did not answer in time")
        return future.result()

    def _refuse(self, key: TierKey) -> None:
        found = self.find(key)
        if found is not None:
            found.peer.refused.add(key)

    async def close(self) -> None:
        """Close every file; locks go with them."""
        self._thread.shutdown(wait=False)
        if self._opening:
            await asyncio.wait(list(self._opening.values()), timeout=_CLOSE_TIMEOUT_S)
        for peer in self._peers.values():
            self._retired |= set(peer.files.values())
            peer.files.clear()
        self._held.clear()
        self._held_at.clear()
        for region in list(self._retired):
            self._close_idle(region)
        if self._closing:
            await asyncio.wait(list(self._closing), timeout=_CLOSE_TIMEOUT_S)


def _lock_stored(fd: int, start: int) -> bool:
    """Lock the record at `start` unless its writer has evicted it; returns whether it is locked now.

    The writer's lock on an evicted record lasts until its segment is deleted: then the file has no name left.
    """
    if not lock_range(fd, start, 1, exclusive=False):
        return False
    if os.fstat(fd).st_nlink:
        return True
    unlock_range(fd, start, 1)
    return False


_Placed = Sequence[tuple[ReadRequest, FileRegion, Location]]


def _not_in_place(placed: _Placed) -> set[TierKey]:
    """Return the objects whose records are not where the journal said. Blocking."""
    return {
        read.key
        for read, file, at in placed
        if not record_in_place(file.fd, read.key, at.offset, at.nbytes, at.checksum)
    }


def _damaged(placed: _Placed) -> set[TierKey]:
    return {
        read.key
        for read, _, at in placed
        if read.into.nbytes == at.nbytes
        and not read.into.region.on_device
        and xxhash.xxh3_64_intdigest(read.into.view) != at.checksum
    }
