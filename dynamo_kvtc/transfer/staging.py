"""The staging pool: one registered region, leased out in pieces for the time of a transfer."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from dynamo_kvtc.errors import TransferError, TransferTimeoutError
from dynamo_kvtc.transfer.agent import TransferAgent
from dynamo_kvtc.transfer.allocator import RangeAllocator
from dynamo_kvtc.transfer.memory import MemoryRegion, MemorySpan

__all__ = ["StagingPool"]


@dataclass(eq=False, slots=True)
class _Waiter:
    nbytes: int
    granted: asyncio.Future[MemorySpan]


class StagingPool:
    """A fixed amount of registered memory, shared by everything in flight. Make one with `create`.

    Leases are granted strictly in the order of asking, so a large one cannot be starved by small ones.
    """

    def __init__(
        self, agent: TransferAgent, region: MemoryRegion, *, alignment: int, max_waiters: int
    ) -> None:
        self._agent = agent
        self._region = region
        self._allocator = RangeAllocator(region.nbytes, alignment)
        self._max_waiters = max_waiters
        self._waiters: deque[_Waiter] = deque()
        self._closed = False

    @classmethod
    async def create(
        cls,
        agent: TransferAgent,
        nbytes: int,
        *,
        alignment: int = 64,
        max_waiters: int = 1024,
        pinned: bool = False,
    ) -> StagingPool:
        """Allocate and register the pool's `nbytes` bytes.

        Parameters
        ----------
        alignment : int
            Of every lease's start, in bytes.
        max_waiters : int
            Callers that may wait for room; further ones fail at once.
        pinned : bool
            Whether a CUDA device copies to and from it.
        """
        region = await agent.allocate(nbytes, pinned=pinned)
        return cls(agent, region, alignment=alignment, max_waiters=max_waiters)

    @property
    def nbytes(self) -> int:
        """Size of the pool, and of the largest possible lease, in bytes."""
        return self._allocator.capacity

    @property
    def leased_bytes(self) -> int:
        """Bytes leased out, or parked because an abandoned transfer may still touch them."""
        return self._allocator.allocated_bytes

    @asynccontextmanager
    async def lease(self, nbytes: int, timeout_s: float) -> AsyncIterator[MemorySpan]:
        """Lease `nbytes` bytes for the time of the ``async with`` block.

        If a transfer into or out of the lease was abandoned, its bytes return to the pool only once it
        has drained.

        Raises
        ------
        TransferError
            At once, if the lease is larger than the pool, too many wait, or the pool is closed.
        TransferTimeoutError
            If there was no room within `timeout_s`.
        """
        span = await self._acquire(nbytes, timeout_s)
        try:
            yield span
        finally:
            self.release(span)

    def try_lease(self, nbytes: int) -> MemorySpan | None:
        """Lease `nbytes` bytes if there is room now and nobody waits for it; end it with `release`."""
        return None if self._closed or self._waiters else self._take(nbytes)

    def release(self, span: MemorySpan) -> None:
        """End a lease of `try_lease`; its bytes return once no transfer touches them any more."""
        self._agent.on_drained(span, lambda: self._give_back(span))

    async def close(self) -> None:
        """Fail whoever waits and free the region. Idempotent; leases in use stay readable."""
        if self._closed:
            return
        self._closed = True
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.granted.done():
                waiter.granted.set_exception(TransferError("the staging pool was closed"))
        await self._agent.free(self._region)

    async def _acquire(self, nbytes: int, timeout_s: float) -> MemorySpan:
        if self._closed:
            raise TransferError("the staging pool is closed")
        if nbytes < 1:
            raise ValueError(f"cannot lease {nbytes} bytes")
        if nbytes > self.nbytes:
            raise TransferError(
                f"a lease of {nbytes} bytes exceeds the staging pool of {self.nbytes} bytes; enlarge the pool"
            )
        if not self._waiters:
            span = self._take(nbytes)
            if span is not None:
                return span
        if len(self._waiters) >= self._max_waiters:
            raise TransferError(f"{self._max_waiters} callers wait for staging memory already")
        waiter = _Waiter(nbytes, asyncio.get_running_loop().create_future())
        self._waiters.append(waiter)
        try:
            await asyncio.wait({waiter.granted}, timeout=timeout_s)
        except asyncio.CancelledError:
            self._withdraw(waiter)
            raise
        if not waiter.granted.done():
            self._withdraw(waiter)
            raise TransferTimeoutError(
                f"no room for {nbytes} bytes in the staging pool within {timeout_s:g} s "
                f"({self.leased_bytes} of {self.nbytes} bytes leased)"
            )
        return waiter.granted.result()

    def _withdraw(self, waiter: _Waiter) -> None:
        if not waiter.granted.done():
            self._waiters.remove(waiter)
            self._grant()
        elif waiter.granted.exception() is None:
            self._give_back(waiter.granted.result())

    def _take(self, nbytes: int) -> MemorySpan | None:
        offset = self._allocator.allocate(nbytes)
        return None if offset is None else self._region.span(offset, nbytes)

    def _give_back(self, span: MemorySpan) -> None:
        self._allocator.free(span.offset, span.nbytes)
        self._grant()

    def _grant(self) -> None:
        while self._waiters and not self._closed:
            span = self._take(self._waiters[0].nbytes)
            if span is None:
                return
            self._waiters.popleft().granted.set_result(span)
