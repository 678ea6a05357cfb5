"""The gate in front of a remote store: so many requests at a time, and none while its breaker is open."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from dynamo_kvtc.deadline import in_time
from dynamo_kvtc.errors import (
    ObjectCorruptError,
    ObjectMissingError,
    StoreUnavailableError,
    TransferError,
    TransferTimeoutError,
)
from dynamo_kvtc.tiers.breaker import CircuitBreaker

__all__ = ["RequestGate"]


class RequestGate:
    """Lets requests pass, and tells the breaker what came of them. Lives on one event loop.

    Parameters
    ----------
    store : str
        Names the store in messages.
    most_requests : int
        Requests in flight; further ones wait, within their deadlines.
    timeout_s : float
        How long the store has for one request. Only a deadline that gave it as much speaks against it.
    """

    def __init__(self, store: str, most_requests: int, timeout_s: float) -> None:
        self.breaker = CircuitBreaker()
        self._store, self._most_requests, self._timeout_s = store, most_requests, timeout_s
        self._slots = asyncio.Semaphore(most_requests)

    @asynccontextmanager
    async def request(self, deadline: float) -> AsyncIterator[float]:
        """Wait for a turn; gives the seconds left until `deadline`, on `time.monotonic`'s clock.

        Raises
        ------
        StoreUnavailableError
            At once, while the breaker is open.
        TransferTimeoutError
            If the deadline passed before it was this request's turn.
        """
        left = deadline - time.monotonic()
        if left <= 0:
            raise TransferTimeoutError(f"the deadline passed before {self._store} was asked")
        self._check_breaker()
        await self._take_slot(left)
        try:
            left = max(0.0, deadline - time.monotonic())
            self._check_breaker(take=True)
            with self._reported(left):
                yield left
        finally:
            self._slots.release()

    async def _take_slot(self, timeout_s: float) -> None:
        if not self._slots.locked():
            await self._slots.acquire()  # does not wait
            return
        try:
            await in_time(self._slots.acquire(), timeout_s, give_back=lambda _: self._slots.release())
        except asyncio.TimeoutError:
            raise TransferTimeoutError(
                f"{self._most_requests} requests to {self._store} are in flight already"
            ) from None

    def _check_breaker(self, *, take: bool = False) -> None:
        if not (self.breaker.allow() if take else self.breaker.state != "open"):
            raise StoreUnavailableError(
                f"{self._store} kept failing; next try in {self.breaker.retry_in_s:.0f} s"
            )

    @contextmanager
    def _reported(self, left: float) -> Iterator[None]:
        """Tell the breaker: an answer that an object is missing or damaged is an answer."""
        try:
            yield
        except TransferError as error:
            if isinstance(error, TransferTimeoutError) and left < self._timeout_s:
                self.breaker.undecided()
            else:
                self.breaker.failed()
            raise
        except (ObjectMissingError, ObjectCorruptError):
            self.breaker.succeeded()
            raise
        except BaseException:
            self.breaker.undecided()
            raise
        self.breaker.succeeded()
