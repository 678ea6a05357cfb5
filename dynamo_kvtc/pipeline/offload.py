"""Offload: gather from the paged cache, encode in batches, store. Never blocks the caller.

One bounded queue and one worker task. What does not fit into the queue is dropped and counted: a lost
offload costs a later recomputation, a blocked engine step costs every request.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

from dynamo_kvtc.blocking import run_to_end
from dynamo_kvtc.codec.paged_codec import EncodedStream, PagedBlock, PendingEncode
from dynamo_kvtc.errors import (
    CodecError,
    KvtcError,
    LayoutError,
    TierClosedError,
    TierFullError,
    TransferError,
    TransferTimeoutError,
)
from dynamo_kvtc.observability import Counters, DropReason
from dynamo_kvtc.pipeline.blocks import TierBlockRef
from dynamo_kvtc.pipeline.boundary import Boundaries, Boundary, Fence
from dynamo_kvtc.pipeline.encoders import Encoder, Encoders
from dynamo_kvtc.pipeline.paged import PagedKvCache
from dynamo_kvtc.pipeline.ticket import OffloadResult, OffloadTicket
from dynamo_kvtc.policy import OffloadPolicy, Speeds
from dynamo_kvtc.policy.priorities import times_spared
from dynamo_kvtc.tiers.base import TierKey
from dynamo_kvtc.tiers.stack import TierStack
from dynamo_kvtc.transfer.staging import StagingPool

__all__ = ["OffloadResult", "OffloadTicket", "Offloader"]

_log = logging.getLogger(__name__)

# The first class that fits names the reason, so subclasses stand before their bases.
_DROP_REASONS: tuple[tuple[type[KvtcError], DropReason], ...] = (
    (CodecError, "unencodable"),
    (LayoutError, "unencodable"),
    (TierFullError, "tier_full"),
    (TierClosedError, "closed"),
    (TransferTimeoutError, "timeout"),
    (TransferError, "transfer"),
)


@dataclass(slots=True)
class _Job:
    ref: TierBlockRef
    source: PagedKvCache
    ticket: OffloadTicket
    after: Fence | None
    encoder: Encoder
    #: Into how many leading tiers it goes; None: all.
    depth: int | None


@dataclass(slots=True)
class _Encoded:
    job: _Job
    stream: EncodedStream | Exception


class Offloader:
    """Owns the offload queue and its worker task. Lives on one event loop.

    Parameters
    ----------
    boundaries : Boundaries
        Encode out of the caches that tier blocks lie in.
    executor : Executor
        Runs gather and encode, so that neither touches the event loop, and beside them the copying of
        streams into staging memory: two threads are of use.
    queue_limit : int
        Tier blocks that may wait; more are dropped.
    batch : int
        Tier blocks gathered and encoded in one go.
    at_once : int
        Tier blocks of a batch that are stored side by side.
    timeout_s : float
        Deadline of each staging lease and each put.
    speeds : Speeds, optional
        Where the measured speed of encoding goes.
    """

    def __init__(
        self,
        encoders: Encoders,
        boundaries: Boundaries,
        tiers: TierStack,
        staging: StagingPool,
        policy: OffloadPolicy,
        counters: Counters,
        executor: Executor,
        *,
        queue_limit: int = 256,
        batch: int = 4,
        at_once: int = 1,
        timeout_s: float = 30.0,
        speeds: Speeds | None = None,
    ) -> None:
        self._speeds = Speeds() if speeds is None else speeds
        self._encoders, self._boundaries = encoders, boundaries
        self._tiers, self._staging = tiers, staging
        self._policy, self._counters, self._executor = policy, counters, executor
        self._queue_limit, self._batch, self._timeout_s = queue_limit, batch, timeout_s
        self._at_once = at_once
        self._queue: deque[_Job] = deque()
        #: Keys that wait or are in work: two sequences that share a prefix encode it once.
        self._keys: set[TierKey] = set()
        self._in_work: list[OffloadTicket] = []
        self._wake = asyncio.Event()
        self._closed = False
        self._worker = asyncio.get_running_loop().create_task(self._run(), name="kvtc-offload")

    @property
    def pending(self) -> int:
        """Tier blocks that wait in the queue."""
        return len(self._queue)

    def submit(
        self,
        refs: Sequence[TierBlockRef],
        source: PagedKvCache,
        encoder: Encoder | None = None,
        depth: int | None = None,
    ) -> OffloadTicket:
        """Queue tier blocks and return at once.

        The engine must not reuse the blocks before ``ticket.gathered()`` has completed.

        Parameters
        ----------
        encoder : Encoder, optional
            What to encode with, if the quality guard does not object meanwhile.
        depth : int, optional
            Into how many leading tiers they go; None: all.
        """
        chosen = encoder or self._encoders.current
        for ref in refs:
            self._prefer(ref)
        wanted = [ref for ref in refs if ref.key not in self._keys and self._tiers.size_of(ref.key) is None]
        room = 0 if self._closed else max(0, self._queue_limit - len(self._queue))
        accepted = wanted[:room]
        ticket = OffloadTicket(len(accepted))
        ticket.result.already_stored = len(refs) - len(wanted)
        ticket.result.dropped = len(wanted) - len(accepted)
        if ticket.result.dropped:
            self._counters.dropped("closed" if self._closed else "queue_full", ticket.result.dropped)
        self._queue.extend(_Job(ref, source, ticket, source.fenced, chosen, depth) for ref in accepted)
        self._keys.update(ref.key for ref in accepted)
        self._in_work = [held for held in self._in_work if not held.is_finished()]
        if accepted:
            self._in_work.append(ticket)
        self._wake.set()
        return ticket

    async def drop(self, timeout_s: float) -> None:
        """Drop what waits and wait until the batches in work have come to an end.

        Raises
        ------
        TransferTimeoutError
            If they do not within `timeout_s` seconds.
        """
        self._drop_queue("cancelled")
        tickets = list(self._in_work)
        if tickets:
            _, late = await asyncio.wait([ticket._done for ticket in tickets], timeout=timeout_s)
            if late:
                raise TransferTimeoutError(f"offloads in work did not end within {timeout_s:g} s")

    async def close(self) -> None:
        """Drop what waits, let the batch in work come to an end, stop the worker."""
        self._closed = True
        self._drop_queue("closed")
        self._wake.set()
        await self._worker

    def _drop_queue(self, reason: DropReason) -> None:
        while self._queue:
            job = self._queue.popleft()
            self._finish_dropped(job, reason)
            job.ticket._mark_gathered(1)

    async def _run(self) -> None:
        storing: asyncio.Task[None] | None = None
        while True:
            await self._wake.wait()
            if not self._queue:
                self._wake.clear()
                if self._closed:
                    break
                continue
            encoded = await self._gather_and_encode(self._next_batch())
            # While this batch is stored the next one is encoded; one batch of each, no more.
            if storing is not None:
                await storing
            storing = asyncio.get_running_loop().create_task(self._store(encoded))
            # Streams hold memory of a device; kept here, the last batch would while nothing is offloaded.
            del encoded
        if storing is not None:
            await storing

    def _next_batch(self) -> list[_Job]:
        """Take jobs that share source and encoder: one gather serves them, and fits into staging memory."""
        first = self._queue.popleft()
        most = self._boundaries.of(first.source).most_encode_tokens
        jobs, tokens = [first], first.ref.num_tokens
        while self._queue and len(jobs) < self._batch:
            following = self._queue[0]
            tokens += following.ref.num_tokens
            alike = following.source is first.source and following.encoder is first.encoder
            if not alike or (most is not None and tokens > most):
                break
            jobs.append(self._queue.popleft())
        return jobs

    async def _gather_and_encode(self, jobs: list[_Job]) -> list[_Encoded]:
        boundary = self._boundaries.of(jobs[0].source)
        encoder = self._encoders.resolve(jobs[0].encoder)
        for job in jobs:
            job.encoder = encoder
        start = time.perf_counter()
        try:
            with self._counters.timed("gather"):
                pending = await run_to_end(self._executor, lambda: self._gather(boundary, jobs))
        except Exception as error:
            self._drop(jobs, error)
            return []
        finally:
            # Looked at before the engine is told: what is void was perhaps read while it was overwritten.
            void = [job.ticket._void for job in jobs]
            for job in jobs:
                job.ticket._mark_gathered(1)
        for job, is_void in zip(jobs, void, strict=True):
            if is_void:
                self._finish_dropped(job, "cancelled")
        if all(void):
            return []
        gather_s = 0.0 if boundary.launches else time.perf_counter() - start
        try:
            with self._counters.timed("encode"):
                streams = await run_to_end(self._executor, pending.streams)
        except Exception as error:
            self._drop([job for job, is_void in zip(jobs, void, strict=True) if not is_void], error)
            return []
        sizes = [stream.nbytes for stream in streams if not isinstance(stream, Exception)]
        if len(sizes) == len(jobs):
            tokens = sum(job.ref.num_tokens for job in jobs)
            self._speeds.encoded(encoder.name, tokens, sum(sizes), time.perf_counter() - start - gather_s)
        return [
            _Encoded(job, stream)
            for job, stream, is_void in zip(jobs, streams, void, strict=True)
            if not is_void
        ]

    def _gather(self, boundary: Boundary, jobs: list[_Job]) -> PendingEncode:
        """Begin to encode and wait until the engine may reuse its blocks."""
        sinks_in = self._policy.sinks_in
        blocks = [
            PagedBlock(
                job.ref.block_ids,
                job.ref.num_tokens,
                job.ref.first_position,
                sinks_in(job.ref.first_position),
                job.ref.key,
            )
            for job in jobs
        ]
        # Fences are points of one stream: the last stands for the others.
        pending = boundary.begin_encode(jobs[0].source, blocks, jobs[0].encoder, jobs[-1].after)
        pending.gathered.wait()
        return pending

    async def _store(self, encoded: list[_Encoded]) -> None:
        turns = asyncio.Semaphore(self._at_once)

        async def in_turn(item: _Encoded) -> None:
            async with turns:
                await self._store_one(item)

        await asyncio.gather(*map(in_turn, encoded))

    async def _store_one(self, item: _Encoded) -> None:
        if isinstance(item.stream, Exception):
            self._drop([item.job], item.stream)
            return
        stream, key = item.stream, item.job.ref.key
        try:
            with self._counters.timed("store"):
                async with self._staging.lease(stream.nbytes, timeout_s=self._timeout_s) as span:
                    await run_to_end(self._executor, partial(stream.copy_into, span.view))
                    written = await self._tiers.put(
                        key, span, timeout_s=self._timeout_s, depth=item.job.depth
                    )
        except Exception as error:
            self._drop([item.job], error)
        else:
            self._prefer(item.job.ref)
            self._finish_stored(item.job, stream.nbytes if written else 0)

    def _prefer(self, ref: TierBlockRef) -> None:
        """Keep what a request of high priority stores, or finds stored, for longer."""
        if times := times_spared(ref.priority):
            self._tiers.prefer([ref.key], times)

    def _finish_stored(self, job: _Job, stored_bytes: int) -> None:
        result = job.ticket.result
        if stored_bytes:
            result.stored += 1
            result.stored_bytes += stored_bytes
            self._counters.offloaded(
                blocks=1,
                tokens=job.ref.num_tokens,
                raw_bytes=job.ref.num_tokens * job.encoder.codec.geometry.token_bytes,
                stored_bytes=stored_bytes,
                encoder=job.encoder.name,
            )
        else:
            result.already_stored += 1
        self._finish(job)

    def _drop(self, jobs: list[_Job], error: Exception) -> None:
        reasons = (name for kind, name in _DROP_REASONS if isinstance(error, kind))
        reason: DropReason = next(reasons, "error")
        if isinstance(error, KvtcError):
            _log.warning("%d tier blocks not offloaded (%s): %s", len(jobs), reason, error)
        else:
            _log.error("%d tier blocks not offloaded by an unexpected error", len(jobs), exc_info=error)
        self._counters.failed(error)
        for job in jobs:
            self._finish_dropped(job, reason)

    def _finish_dropped(self, job: _Job, reason: DropReason) -> None:
        self._counters.dropped(reason)
        job.ticket.result.dropped += 1
        self._finish(job)

    def _finish(self, job: _Job) -> None:
        self._keys.discard(job.ref.key)
        job.ticket._mark_finished(1)
