"""The disk tier whose folder several workers share: each writes its own part, all read everything.

Below the folder each worker has a folder ``writer-<16 hex digits>``, which is a disk tier of its own
(`dynamo_kvtc.tiers.disk`) with a lock that dies with its process, and a journal that the others follow. A
worker that starts takes over the folder of one that has ended, objects and all, or makes a new one; so there
are never more of them than workers have run at once.

One writer per key: a worker claims a key before it writes it, with a lock that dies with it too, and looks
whether somebody has stored it meanwhile. Eviction is the writer's alone, and passes over what others are
reading or have pinned. An object of a worker that ended is served as long as its folder is there.

For local file systems: processes on other machines would not see the locks.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from dynamo_kvtc.blocking import run_to_end
from dynamo_kvtc.errors import (
    TierClosedError,
    TierError,
    TierInUseError,
    TransferError,
    TransferTimeoutError,
)
from dynamo_kvtc.tiers.base import KEY_BYTES, OnChange, ReadRequest, Tier, TierKey, TierStats
from dynamo_kvtc.tiers.disk import DiskSettings, DiskTier
from dynamo_kvtc.tiers.disk_files import make_folder
from dynamo_kvtc.tiers.disk_format import RECORD_HEADER_BYTES, WRITER_PREFIX, record_bytes, segment_files
from dynamo_kvtc.tiers.index import Location
from dynamo_kvtc.tiers.journal import JournalWriter
from dynamo_kvtc.tiers.peers import Peers
from dynamo_kvtc.tiers.range_locks import KeyClaims, lock_range
from dynamo_kvtc.transfer import MemorySpan, TransferAgent

__all__ = ["SharedDiskTier"]

# A lookup sees what others had stored this long ago, so that many lookups do not read the folder each.
_LOOKUP_AGE_S = 0.05
_LOOKUP_TIMEOUT_S = 5.0

# New folders that a worker tries to get hold of; workers that start at the same moment may take one each.
_NEW_FOLDERS = 16


class _OwnTier(DiskTier):
    """The part of a shared folder that this worker writes."""

    _journal: JournalWriter | None = None

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        # Evicted objects that the journal does not tell of yet; it does before their room is given back.
        self._gone: deque[TierKey] = deque()

    @classmethod
    async def open_own(
        cls, agent: TransferAgent, folder: Path, capacity_bytes: int, settings: DiskSettings | None, name: str
    ) -> _OwnTier:
        tier = await cls.open(agent, folder, capacity_bytes, settings=settings, name=name)
        assert isinstance(tier, _OwnTier)
        try:
            await tier._begin_journal()
        except BaseException:
            await tier.close()
            raise
        return tier

    async def _begin_journal(self) -> None:
        objects = [(key, self._index.get(key)) for key in self._index.oldest_first()]
        known = [(key, location) for key, location in objects if location is not None]
        self._gone.clear()
        self._journal = await self._log.run(partial(JournalWriter, self._folder, known), None)
        self._log.before_giving_back = self._tell_gone

    def touch(self, keys: Sequence[TierKey]) -> None:
        """Make stored objects the most recently used ones, the last of `keys` first."""
        for key in reversed(keys):
            if key in self._index:
                self._index.touch(key)

    async def _store(self, key: TierKey, source: MemorySpan, timeout_s: float) -> Location:
        deadline = time.monotonic() + timeout_s
        location = await super()._store(key, source, timeout_s)
        try:
            left = deadline - time.monotonic()
            await self._log.run(partial(self._tell_stored, key, location), max(0.0, left))
        except BaseException:
            self._gone.append(key)
            self._reclaim(location)
            raise
        return location

    def _may_evict(self, key: TierKey) -> bool:
        if not super()._may_evict(key):
            return False
        location = self._index.get(key)
        if location is None:
            return False
        # Kept for good: the range is never written again. It goes when the segment is closed.
        start, size = location.offset - RECORD_HEADER_BYTES, record_bytes(location.nbytes)
        return lock_range(self._log[location.segment].fd, start, size, exclusive=True)

    def _evict(self, key: TierKey) -> None:
        self._gone.append(key)
        super()._evict(key)

    def _drop_corrupt(self, key: TierKey) -> None:
        self._gone.append(key)
        super()._drop_corrupt(key)

    def _tell_stored(self, key: TierKey, location: Location) -> None:
        # The same key may have been evicted before: that is told first.
        self._tell_gone()
        self._told.stored(key, location)

    def _tell_gone(self) -> None:
        """Tell of all objects whose room may be given back now. In the log's thread."""
        with contextlib.suppress(IndexError):
            while True:
                self._told.gone(self._gone.popleft())

    @property
    def _told(self) -> JournalWriter:
        assert self._journal is not None
        return self._journal

    async def close(self) -> None:
        """See `DiskTier.close`; the journal stays."""
        await super().close()
        journal, self._journal = self._journal, None
        if journal is not None:
            journal.close()


class SharedDiskTier(Tier):
    """A disk tier in a folder that several workers share. Make one with `open`.

    `put`, capacity, eviction, `clear` and most counters are about this worker's own objects; lookups and
    reads about everybody's.
    """

    def __init__(self, own: _OwnTier, peers: Peers, claims: KeyClaims) -> None:
        self.name = own.name
        self._own, self._peers, self._claims = own, peers, claims
        self._claimed: set[TierKey] = set()
        self._closed = False
        self._lookups = self._hits = self._bytes_read = 0

    @classmethod
    async def open(
        cls,
        agent: TransferAgent,
        folder: str | os.PathLike[str],
        capacity_bytes: int,
        *,
        settings: DiskSettings | None = None,
        name: str = "disk",
    ) -> SharedDiskTier:
        """Join the workers of a folder (made if missing); `capacity_bytes` is for this worker's own objects.

        Raises
        ------
        TierError
            If the folder cannot be used, or holds segments that cannot be read; `TierInUseError` if other
            workers take every part of it first.
        """
        path = Path(folder)
        try:
            claims, names = await run_to_end(
                None, partial(_join_folder, path), lambda joined: joined[0].close()
            )
        except OSError as error:
            raise TierError(f"cannot use {path} for a disk tier: {error}; check path and rights") from error
        own: _OwnTier | None = None
        try:
            # Another worker that starts now may see a new folder, and take it over, before it is locked.
            fresh = [WRITER_PREFIX + secrets.token_hex(8) for _ in range(_NEW_FOLDERS)]
            for candidate in [*names, *fresh]:
                try:
                    own = await _OwnTier.open_own(agent, path / candidate, capacity_bytes, settings, name)
                except TierInUseError:
                    continue
                break
            if own is None:
                raise TierInUseError(f"other workers took every folder that was made below {path}; try again")
            tier = cls(own, Peers(agent, path, candidate), claims)
            await tier._peers.refresh(_LOOKUP_TIMEOUT_S)
        except BaseException:
            if own is not None:
                await own.close()
            claims.close()
            raise
        return tier

    async def contains_prefix(self, keys: Sequence[TierKey]) -> int:
        """Return how many leading `keys` some worker has stored whole; touches this worker's own."""
        self._own._check_usable()
        with contextlib.suppress(TransferTimeoutError):  # then what was known before counts
            await self._peers.refresh(_LOOKUP_TIMEOUT_S, max_age_s=_LOOKUP_AGE_S)
        count = next((i for i, key in enumerate(keys) if self.size_of(key) is None), len(keys))
        self._own.touch(keys[:count])
        others = [key for key in keys[:count] if self._own.size_of(key) is None]
        await self._peers.prepare(others, _LOOKUP_TIMEOUT_S)
        self._lookups += len(keys)
        self._hits += count
        return count

    def size_of(self, key: TierKey) -> int | None:
        """Return the size of an object that some worker has stored, or None."""
        size = self._own.size_of(key)
        if size is None and (found := self._peers.find(key)) is not None:
            size = found.location.nbytes
        return size

    async def put(self, key: TierKey, source: MemorySpan, *, timeout_s: float) -> bool:
        """Store an object unless some worker has it or is writing it; see `Tier.put`."""
        self._own._check_usable()
        if key in self._claimed or self.size_of(key) is not None:
            return False
        try:
            if not self._claims.claim(key):
                return False
        except OSError as error:
            raise TransferError(
                f"cannot claim a key in the folder of the {self.name} tier: {error}"
            ) from error
        self._claimed.add(key)
        deadline = time.monotonic() + timeout_s
        try:
            await self._peers.refresh(timeout_s)
            if self._peers.find(key) is not None:
                return False
            return await self._own.put(key, source, timeout_s=deadline - time.monotonic())
        finally:
            self._claimed.discard(key)
            if not self._closed:
                self._claims.release(key)

    @property
    def reads_into_device(self) -> bool:
        """True: objects of every worker are read as those of a `DiskTier`."""
        return True

    async def get(self, reads: Sequence[ReadRequest], *, timeout_s: float) -> None:
        """Move byte ranges of objects of any worker into registered memory; see `Tier.get`."""
        self._own._check_usable()
        own: list[ReadRequest] = []
        others: list[ReadRequest] = []
        for read in reads:
            is_other = self._own.size_of(read.key) is None and self._peers.find(read.key) is not None
            (others if is_other else own).append(read)
        # Both to their end, whatever happens to one: the destinations are not free before.
        results = await asyncio.gather(
            self._own.get(own, timeout_s=timeout_s),
            self._peers.get(others, timeout_s=timeout_s),
            return_exceptions=True,
        )
        failure = next((result for result in results if result is not None), None)
        if self._closed:
            raise TierClosedError(f"the {self.name} tier was closed during the call") from failure
        if failure is not None:
            raise failure
        self._bytes_read += sum(read.into.nbytes for read in others)

    def pin(self, keys: Iterable[TierKey]) -> list[TierKey]:
        """Protect objects from eviction; those of others once `contains_prefix` has found them."""
        return [key for key in keys if self._own.pin([key]) or self._peers.hold(key)]

    def unpin(self, keys: Iterable[TierKey]) -> None:
        """Undo `pin`."""
        for key in keys:
            if not self._peers.let_go(key):
                self._own.unpin([key])

    def prefer(self, keys: Iterable[TierKey], times: int) -> None:
        """Let eviction pass over objects of this worker; those of others are theirs to evict."""
        self._own.prefer(keys, times)

    async def evict(self, keys: Iterable[TierKey]) -> int:
        """Drop this worker's objects, and see those of others no more; returns how many went from sight."""
        self._own._check_usable()
        wanted = list(keys)
        gone = await self._own.evict(wanted)
        return gone + sum(self._peers.forget(key) for key in dict.fromkeys(wanted))

    async def clear(self) -> None:
        """Drop every object of this worker that is not pinned or being read."""
        await self._own.clear()

    def watch(self, on_change: OnChange) -> None:
        """Report this worker's own objects; what others store and drop they report themselves."""
        self._own.watch(on_change)

    def stats(self) -> TierStats:
        """Return the counters; objects and bytes stored are this worker's own."""
        own = self._own.stats()
        return replace(
            own, lookups=self._lookups, hits=self._hits, bytes_read=own.bytes_read + self._bytes_read
        )

    async def close(self) -> None:
        """Leave the folder; the objects stay, for the others and for who takes over. Idempotent."""
        if self._closed:
            return
        self._closed = True
        await self._own.close()
        await self._peers.close()
        self._claims.close()


def _join_folder(folder: Path) -> tuple[KeyClaims, list[str]]:
    """Make the folder and its claims, and list the folders of workers. Blocking."""
    make_folder(folder)
    if segment_files(folder):
        raise TierError(
            f"{folder} holds the objects of a disk tier that was not shared; give the shared one another "
            f"folder, or remove them"
        )
    claims = KeyClaims(folder / "claims")
    try:
        claims.claim(bytes(KEY_BYTES))
        claims.release(bytes(KEY_BYTES))
    except OSError:
        claims.close()
        raise
    return claims, sorted(path.name for path in folder.iterdir() if path.name.startswith(WRITER_PREFIX))
