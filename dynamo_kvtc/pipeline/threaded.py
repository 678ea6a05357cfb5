"""The thread-safe face of `TierAdapter`, for hosts that are not asyncio."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from typing import Any, TypeVar

import torch

from dynamo_kvtc.errors import OnboardError, TierClosedError, TransferTimeoutError
from dynamo_kvtc.observability import Counters
from dynamo_kvtc.pipeline.adapter import TierAdapter
from dynamo_kvtc.pipeline.blocks import SequenceBlocks
from dynamo_kvtc.pipeline.handle import OnboardHandle
from dynamo_kvtc.pipeline.paged import PagedKvCache
from dynamo_kvtc.pipeline.status import AdapterStatus
from dynamo_kvtc.pipeline.ticket import OffloadResult, OffloadTicket

__all__ = ["ThreadedOffload", "ThreadedOnboard", "ThreadedTierAdapter"]

T = TypeVar("T")


class ThreadedTierAdapter:
    """Runs a `TierAdapter` on an event loop in a thread of its own. Callable from any thread.

    Parameters
    ----------
    factory : Callable
        Makes the adapter; called on the new loop.
    timeout_s : float
        Deadline of `open`, `lookup`, `reset` and `close`.
    """

    def __init__(self, factory: Callable[[], Awaitable[TierAdapter]], *, timeout_s: float = 60.0) -> None:
        self._timeout_s = timeout_s
        self._loop = asyncio.new_event_loop()
        self._closed = False
        self._thread = threading.Thread(target=self._loop.run_forever, name="kvtc-loop", daemon=True)
        self._thread.start()
        try:
            self._adapter = self._call(_await(factory()))
        except BaseException:
            self._stop_loop()
            raise

    def lookup(self, hashes: Sequence[bytes], *, salt: bytes = b"") -> int:
        """See `TierAdapter.lookup`."""
        return self._call(self._adapter.lookup(hashes, salt=salt))

    def offload(
        self, blocks: SequenceBlocks, source: PagedKvCache, *, num_tokens: int | None = None
    ) -> ThreadedOffload:
        """See `TierAdapter.offload`."""

        async def start() -> OffloadTicket:
            return self._adapter.offload(blocks, source, num_tokens=num_tokens)

        return ThreadedOffload(self, self._call(start()))

    def onboard(self, blocks: SequenceBlocks, destination: PagedKvCache) -> ThreadedOnboard:
        """See `TierAdapter.onboard`."""

        async def start() -> OnboardHandle:
            return self._adapter.onboard(blocks, destination)

        return ThreadedOnboard(self, self._call(start()))

    def prefilled(self, tokens: int, seconds: float) -> None:
        """See `TierAdapter.prefilled`; waits for nothing."""
        with suppress(RuntimeError):  # the loop is closed: nobody decides any more
            self._loop.call_soon_threadsafe(self._adapter.prefilled, tokens, seconds)

    @property
    def counters(self) -> Counters:
        """The adapter's counters; reading them waits for nothing."""
        return self._adapter.counters

    @property
    def blocks_per_tier_block(self) -> int:
        """Blocks of the engine in a tier block."""
        return self._adapter.policy.tier_block_tokens // self._adapter.block_size

    def holds(self, sequence_hash: bytes, *, salt: bytes = b"") -> bool:
        """Tell whether the tier block with this sequence hash is stored whole; waits for nothing."""
        return self.size_of(sequence_hash, salt=salt) is not None

    def size_of(self, sequence_hash: bytes, *, salt: bytes = b"") -> int | None:
        """Return the bytes of that tier block's object; None if it is not stored whole. Waits for nothing."""
        return self._adapter.tiers.size_of(self._adapter.namespace(salt).key(sequence_hash))

    def start(self, make: Callable[[TierAdapter], Coroutine[Any, Any, T]]) -> Future[T]:
        """Begin a coroutine that `make` gives for the adapter on the adapter's loop and return at once."""
        return self._submit(make(self._adapter))

    def run(self, make: Callable[[TierAdapter], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine that `make` gives for the adapter on the adapter's loop and return its result."""
        return self._call(make(self._adapter))

    def reset(self) -> None:
        """See `TierAdapter.reset`."""
        self._call(self._adapter.reset())

    def status(self) -> AdapterStatus:
        """See `TierAdapter.status`."""

        async def read() -> AdapterStatus:
            return self._adapter.status()

        return self._call(read())

    def close(self) -> None:
        """Close the adapter and end its thread. Idempotent."""
        if self._closed:
            return
        try:
            self._call(self._adapter.close())
        finally:
            self._closed = True
            self._stop_loop()

    def _submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        if self._closed:
            coroutine.close()
            raise TierClosedError("this tier adapter is closed; open a new one")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _call(self, coroutine: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        limit = self._timeout_s if timeout_s is None else timeout_s
        future = self._submit(coroutine)
        try:
            return future.result(limit)
        except (TimeoutError, FutureTimeoutError) as error:  # two classes before Python 3.11
            if future.done():
                raise
            future.cancel()
            raise TransferTimeoutError(f"the tier adapter did not answer within {limit:g} s") from error

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(self._timeout_s)
        if not self._thread.is_alive():
            self._loop.close()


class ThreadedOffload:
    """An `OffloadTicket` for threads."""

    def __init__(self, adapter: ThreadedTierAdapter, ticket: OffloadTicket) -> None:
        self._adapter, self._ticket = adapter, ticket

    def gathered(self, timeout_s: float | None = None) -> None:
        """Wait until the blocks may be reused."""
        self._adapter._call(self._ticket.gathered(), timeout_s)

    def is_gathered(self) -> bool:
        """Tell whether the blocks may be reused; waits for nothing."""
        return self._ticket.is_gathered()

    def is_finished(self) -> bool:
        """Tell whether nothing of this call is pending; waits for nothing."""
        return self._ticket.is_finished()

    def void(self) -> None:
        """Give up what is not gathered yet; see `OffloadTicket.void`. Waits for nothing."""
        self._ticket.void()

    def wait(self, timeout_s: float | None = None) -> OffloadResult:
        """Wait until every tier block is stored or dropped."""
        return self._adapter._call(self._ticket.wait(), timeout_s)


class ThreadedOnboard:
    """An `OnboardHandle` for threads."""

    def __init__(self, adapter: ThreadedTierAdapter, handle: OnboardHandle) -> None:
        self._adapter, self.handle = adapter, handle

    def layer(
        self, layer: int, timeout_s: float | None = None, *, stream: torch.cuda.Stream | None = None
    ) -> None:
        """Wait until a layer is in place, or let `stream` wait for it; see `OnboardHandle.layer`.

        Raises
        ------
        OnboardError
            If it never will be.
        """
        self._adapter._call(self.handle.layer(layer, stream), timeout_s)

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until every layer is in place. Raises `OnboardError` if they never will be."""
        self._adapter._call(self.handle.wait(), timeout_s)

    def done(self) -> bool:
        """Tell whether the onboard has ended, well or not."""
        return self.handle.done()

    def error(self) -> OnboardError | None:
        """Return how an onboard that has ended failed, if it did; waits for nothing."""
        return self.handle.error()

    def request_cancel(self) -> None:
        """Begin to stop the onboard and return at once; `done` tells when it touches nothing any more."""
        self._adapter._submit(self.handle.cancel())

    def cancel(self) -> None:
        """Stop the onboard; returns when it touches nothing any more."""
        self._adapter._call(self.handle.cancel())


async def _await(awaitable: Awaitable[T]) -> T:
    return await awaitable
