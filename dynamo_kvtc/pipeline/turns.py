"""Turns: so many at once, and whoever waits is let in by priority."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

__all__ = ["Turns"]


class Turns:
    """Lets a number of holders in at once; whoever waits comes by lowest priority value, then by arrival.

    Deadlines are the caller's. Belongs to one event loop.

    Parameters
    ----------
    at_once : int
        Holders at the same time; a `ValueError` if below 1.
    """

    def __init__(self, at_once: int) -> None:
        if at_once < 1:
            raise ValueError(f"at least one turn at once, not {at_once}")
        self._free = at_once
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._arrivals = itertools.count()

    @property
    def waiting(self) -> int:
        """How many wait for their turn."""
        return sum(not turn.done() for _, _, turn in self._waiting)

    @asynccontextmanager
    async def take(self, priority: int = 0) -> AsyncIterator[None]:
        """Hold a turn for the time of the ``async with`` block."""
        if self._free:
            self._free -= 1
        else:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            heapq.heappush(self._waiting, (priority, next(self._arrivals), turn))
            try:
                await turn
            except asyncio.CancelledError:
                # Cancelled in the moment it was let in: the turn goes to the next one.
                if turn.done() and not turn.cancelled():
                    self._hand_on()
                raise
        try:
            yield
        finally:
            self._hand_on()

    def _hand_on(self) -> None:
        while self._waiting:
            _, _, turn = heapq.heappop(self._waiting)
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
