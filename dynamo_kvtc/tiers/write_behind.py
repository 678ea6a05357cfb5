"""Writing into a slow tier behind the caller's back: several objects at once, within bounds.

A put into a bucket takes a round trip, and whoever offloads should not wait for it once a faster tier has
the object. Its bytes are copied here and written in the background. What does not fit, or does not get
through in time, is dropped: the faster tier has it, and the cache can afford to lose a copy.

Nothing is promised: until the slow tier has confirmed an object, its lookups, counters and events do not
know it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np

from dynamo_kvtc.blocking import run_to_end
from dynamo_kvtc.errors import KvtcError, TransferTimeoutError
from dynamo_kvtc.tiers.base import Tier, TierKey
from dynamo_kvtc.transfer import MemorySpan, StagingPool

__all__ = ["WriteBehind"]

_log = logging.getLogger(__name__)

#: Objects that may wait, however small they are.
_MOST_WAITING = 4096

_CLOSE_TIMEOUT_S = 5.0

#: Copies of this many bytes and more are made in a thread.
_LARGE_COPY_BYTES = 1 << 20

Dropped = Literal["queue_full", "too_late", "failed"]


class WriteBehind:
    """Puts objects into a tier in the background. Lives on the tier's event loop; owns `memory`.

    Parameters
    ----------
    tier : Tier
        Takes the objects; it may be written to in other ways as well.
    memory : StagingPool
        Holds what waits and what is under way, used by nothing else. An object that does not fit into what
        is left of it is dropped.
    at_once : int
        Objects under way; further ones wait for their turn.
    timeout_s : float
        Deadline of an object from when it was taken, its turn included.

    Attributes
    ----------
    dropped : Counter[str]
        Objects that were not written, by reason: ``queue_full``, ``too_late``, or ``failed``, which the tier
        said. What the caller took back is not among them.
    """

    def __init__(self, tier: Tier, memory: StagingPool, *, at_once: int = 8, timeout_s: float = 60.0) -> None:
        self.tier = tier
        self.dropped: Counter[Dropped] = Counter()
        self._memory, self._timeout_s = memory, timeout_s
        self._turn = asyncio.Semaphore(at_once)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kvtc-write-behind")
        self._writing: dict[TierKey, asyncio.Task[None]] = {}
        self._closed = False

    @property
    def waiting(self) -> int:
        """Objects that were taken and are not written yet."""
        return len(self._writing)

    async def take(self, key: TierKey, source: MemorySpan) -> bool:
        """Copy an object and have it written soon; never waits for the tier or for room.

        Returns
        -------
        bool
            Whether it was taken. Not if it is on its way already, or stored, or has to be dropped.
        """
        if not self._wants(key):
            return False
        deadline = time.monotonic() + self._timeout_s
        copy = self._memory.try_lease(source.nbytes) if len(self._writing) < _MOST_WAITING else None
        if copy is None:
            self.dropped["queue_full"] += 1
            return False
        try:
            if source.nbytes < _LARGE_COPY_BYTES:
                copy.view[:] = source.view
            else:
                await run_to_end(self._thread, lambda: _copy(source.view, copy.view))
            if not self._wants(key):
                self._memory.release(copy)
                return False
        except BaseException:
            self._memory.release(copy)
            raise
        task = asyncio.get_running_loop().create_task(
            self._write(key, copy, deadline), name="kvtc-write-behind"
        )
        self._writing[key] = task
        task.add_done_callback(lambda _: self._ended(key, copy))
        return True

    def _wants(self, key: TierKey) -> bool:
        return not self._closed and key not in self._writing and self.tier.size_of(key) is None

    async def _write(self, key: TierKey, copy: MemorySpan, deadline: float) -> None:
        # Whoever is in front ends by an earlier deadline, so the turn comes by this one.
        async with self._turn:
            left = deadline - time.monotonic()
            if left <= 0:
                self.dropped["too_late"] += 1
                return
            try:
                await self.tier.put(key, copy, timeout_s=left)
            except KvtcError as error:
                self.dropped["failed"] += 1
                _log.debug("writing an object into the %s tier failed: %s", self.tier.name, error)
            except Exception:
                self.dropped["failed"] += 1
                _log.exception("writing an object into the %s tier failed unexpectedly", self.tier.name)

    def _ended(self, key: TierKey, copy: MemorySpan) -> None:
        # Not in the task itself: one that is cancelled before it has begun runs nothing.
        del self._writing[key]
        self._memory.release(copy)

    async def forget(self, keys: Collection[TierKey] | None = None) -> None:
        """Take back objects that are not written yet, all of them by default, and wait until they are."""
        tasks = [task for key, task in self._writing.items() if keys is None or key in keys]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def flush(self, timeout_s: float) -> None:
        """Wait until what has been taken so far is written or dropped.

        Raises
        ------
        TransferTimeoutError
            If it is not within `timeout_s` seconds; it goes on.
        """
        if not self._writing:
            return
        _, late = await asyncio.wait(list(self._writing.values()), timeout=timeout_s)
        if late:
            raise TransferTimeoutError(
                f"{len(late)} objects were not written into the {self.tier.name} tier within {timeout_s:g} s"
            )

    async def close(self) -> None:
        """Write what waits, for a while, then drop it; the tier stays open. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._writing:
            _, late = await asyncio.wait(list(self._writing.values()), timeout=_CLOSE_TIMEOUT_S)
            self.dropped["too_late"] += len(late)
        await self.forget()
        await self._memory.close()
        self._thread.shutdown(wait=False)


def _copy(source: memoryview, into: memoryview) -> None:
    # Unlike an assignment of memoryviews, this lets other threads of Python run meanwhile.
    np.copyto(np.frombuffer(into, np.uint8), np.frombuffer(source, np.uint8))
