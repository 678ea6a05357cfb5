"""Single tier blocks, from any place of a sequence, for hosts that submit jobs and poll for their end.

A host that keeps its own book of chunks (one chunk is one tier block here) neither asks for prefixes nor
waits: it hands over a job, goes on, and collects what has ended.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field

from dynamo_kvtc.deadline import in_time
from dynamo_kvtc.errors import KvtcError, OnboardError, TierClosedError, TransferTimeoutError
from dynamo_kvtc.pipeline.adapter import TierAdapter
from dynamo_kvtc.pipeline.blocks import SequenceBlocks
from dynamo_kvtc.pipeline.handle import OnboardHandle
from dynamo_kvtc.pipeline.paged import PagedKvCache
from dynamo_kvtc.pipeline.threaded import ThreadedTierAdapter
from dynamo_kvtc.tiers.base import TierKey

__all__ = [
    "Chunk",
    "ChunkJob",
    "ChunkStore",
    "FinishedJob",
    "chunk_blocks",
    "consecutive_runs",
    "slot_blocks",
]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Chunk:
    """One tier block of the host.

    Attributes
    ----------
    hash : bytes
        Sequence hash up to the chunk's end.
    index : int
        Which chunk of its sequence it is; its first position is `index` times the tokens of a chunk.
    slot : int
        Where it lies, or shall lie, in the host's cache.
    """

    hash: bytes
    index: int
    slot: int


@dataclass(frozen=True, slots=True)
class ChunkJob:
    """Chunks of one sequence, in order, to be stored or loaded.

    Attributes
    ----------
    num_tokens : int
        Length of the sequence as far as it is known, from which the recent window counts. For stores.
    """

    job_id: int
    chunks: Sequence[Chunk]
    is_load: bool
    num_tokens: int = 0


@dataclass(frozen=True, slots=True)
class FinishedJob:
    """What became of a job.

    Attributes
    ----------
    succeeded : bool
        Nothing failed. A chunk that the policy leaves out is no failure.
    done : tuple[bool, ...]
        For each chunk: it is stored, or its KV is in its slot.
    stored_bytes : int
        Bytes of the objects that were written.
    seconds : float
        From submission to the end.
    """

    job: ChunkJob
    succeeded: bool
    done: tuple[bool, ...]
    stored_bytes: int
    seconds: float


@dataclass(slots=True)
class _Pending:
    job: ChunkJob
    since: float = field(default_factory=time.monotonic)


class ChunkStore:
    """Stores and loads chunks of one cache. No method but `drain` and `close` waits; all are thread-safe.

    Owns the adapter: `close` closes it.

    Parameters
    ----------
    adapter : ThreadedTierAdapter
        Its tier block is the host's chunk.
    cache : PagedKvCache
        The host's chunks. A slot is as many consecutive blocks as make a chunk.
    salt : bytes
        Part of every key.
    max_pending : int
        Chunks that may be on their way in either direction; jobs beyond it end at once, failed.
    loads_at_once : int
        Jobs that load at the same time; others wait for their turn.
    load_timeout_s : float
        How long a job waits for its turn. The load itself has the adapter's own deadline.
    fill : Callable, optional
        Begins to load consecutive chunks into their slots; by default the slots of `cache`.
    """

    def __init__(
        self,
        adapter: ThreadedTierAdapter,
        cache: PagedKvCache,
        *,
        salt: bytes = b"",
        max_pending: int = 1024,
        loads_at_once: int = 4,
        load_timeout_s: float = 30.0,
        fill: Callable[[TierAdapter, Sequence[Chunk]], OnboardHandle] | None = None,
    ) -> None:
        self._adapter, self._cache, self._salt = adapter, cache, salt
        self._max_pending = max_pending
        self._fill = fill or self._onboard
        self._load_timeout_s = load_timeout_s
        self._turn = asyncio.Semaphore(loads_at_once)
        self._blocks_per_chunk = adapter.blocks_per_tier_block
        self._changed = threading.Condition()
        self._pending: dict[int, _Pending] = {}
        self._pending_chunks = 0
        self._finished: list[FinishedJob] = []
        self._touching: Future[None] | None = None
        self._closed = False
        #: Jobs that were turned away because too much was on its way.
        self.refused_jobs = 0

    @property
    def pending_jobs(self) -> int:
        """Jobs that have not ended."""
        return len(self._pending)

    def holds(self, sequence_hash: bytes) -> bool:
        """Tell whether a chunk is stored whole."""
        return self.size_of(sequence_hash) is not None

    def size_of(self, sequence_hash: bytes) -> int | None:
        """Return the bytes of a chunk's stored object; None if it is not stored whole."""
        return None if self._closed else self._adapter.size_of(sequence_hash, salt=self._salt)

    def touch(self, hashes: Sequence[bytes]) -> None:
        """Count chunks as used just now, and notice what other workers have stored.

        Best effort: left out while an earlier call is being worked on.
        """
        if self._closed or (self._touching is not None and not self._touching.done()):
            return

        async def touch(adapter: TierAdapter) -> None:
            await adapter.tiers.contains_prefix(self._keys(adapter, hashes))

        with suppress(TierClosedError):
            self._touching = self._adapter.start(touch)

    def submit(self, job: ChunkJob) -> None:
        """Begin a job and return at once."""
        pending = _Pending(job)
        with self._changed:
            full = self._pending_chunks + len(job.chunks) > self._max_pending
            if full or self._closed or not job.chunks:
                self.refused_jobs += full
                self._end(pending, not job.chunks, [False] * len(job.chunks), 0)
                return
            self._pending[job.job_id] = pending
            self._pending_chunks += len(job.chunks)
        try:
            future = self._adapter.start(lambda adapter: self._run(adapter, pending))
        except TierClosedError:
            with self._changed:
                self._leave(pending, False, [False] * len(job.chunks), 0)
            return
        future.add_done_callback(lambda done: self._settle(pending, done))

    def take_finished(self) -> list[FinishedJob]:
        """Return the jobs that have ended since the last call."""
        with self._changed:
            finished, self._finished = self._finished, []
        return finished

    def drain(self, timeout_s: float) -> None:
        """Wait until every job has ended.

        Raises
        ------
        TransferTimeoutError
            If some have not within `timeout_s` seconds.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: not self._pending, timeout_s):
                raise TransferTimeoutError(
                    f"{len(self._pending)} jobs of the compressed tier did not end within {timeout_s:g} s"
                )

    def close(self) -> None:
        """End every job and close the adapter. Afterwards nothing touches the cache. Idempotent.

        Raises
        ------
        TransferTimeoutError
            If the adapter could not be closed in time: something may still touch the cache.
        """
        with self._changed:
            self._closed = True
        self._adapter.close()
        with self._changed:
            for pending in list(self._pending.values()):
                self._leave(pending, False, [False] * len(pending.job.chunks), 0)

    # --- on the adapter's event loop ---------------------------------------------------------------

    async def _run(self, adapter: TierAdapter, pending: _Pending) -> None:
        job = pending.job
        succeeded, stored_bytes = False, 0
        done = [False] * len(job.chunks)
        try:
            if job.is_load:
                succeeded = await self._load(adapter, job, done)
            else:
                succeeded, stored_bytes = await self._store(adapter, job, done)
        except KvtcError as error:
            level = logging.DEBUG if isinstance(error, TierClosedError) else logging.WARNING
            _log.log(level, "a job of %d chunks failed: %s", len(job.chunks), error)
        finally:
            with self._changed:
                self._leave(pending, succeeded, done, stored_bytes)

    async def _store(self, adapter: TierAdapter, job: ChunkJob, done: list[bool]) -> tuple[bool, int]:
        tickets = [
            adapter.offload(self._slots_of(job.chunks[run]), self._cache, num_tokens=job.num_tokens)
            for run in consecutive_runs(job.chunks)
        ]
        results = [await ticket.wait() for ticket in tickets]
        keys = self._keys(adapter, [chunk.hash for chunk in job.chunks])
        done[:] = [adapter.tiers.size_of(key) is not None for key in keys]
        return not any(result.dropped for result in results), sum(result.stored_bytes for result in results)

    async def _load(self, adapter: TierAdapter, job: ChunkJob, done: list[bool]) -> bool:
        try:
            await in_time(
                self._turn.acquire(), self._load_timeout_s, give_back=lambda _: self._turn.release()
            )
        except asyncio.TimeoutError:
            raise TransferTimeoutError(f"no turn to load within {self._load_timeout_s:g} s") from None
        try:
            for run in consecutive_runs(job.chunks):
                done[run] = await self._load_run(adapter, job.chunks[run])
        finally:
            self._turn.release()
        return all(done)

    async def _load_run(self, adapter: TierAdapter, chunks: Sequence[Chunk]) -> list[bool]:
        handle = self._fill(adapter, chunks)
        try:
            await handle.wait()
        except OnboardError as error:
            first_lost = min((start for start, _ in error.tokens_to_recompute), default=0)
            tokens = adapter.policy.tier_block_tokens
            return [(chunk.index + 1) * tokens <= first_lost for chunk in chunks]
        finally:
            # Whoever cancels this job must not get the slots back while they are written.
            await handle.cancel()
        return [True] * len(chunks)

    def _keys(self, adapter: TierAdapter, hashes: Sequence[bytes]) -> list[TierKey]:
        namespace = adapter.namespace(self._salt)
        return [namespace.key(sequence_hash) for sequence_hash in hashes]

    def _onboard(self, adapter: TierAdapter, chunks: Sequence[Chunk]) -> OnboardHandle:
        return adapter.onboard(self._slots_of(chunks), self._cache)

    def _slots_of(self, chunks: Sequence[Chunk]) -> SequenceBlocks:
        return slot_blocks(chunks, self._blocks_per_chunk, self._salt)

    # --- book-keeping ------------------------------------------------------------------------------

    def _settle(self, pending: _Pending, future: Future[None]) -> None:
        """See to it that a job whose coroutine never ran, or failed unexpectedly, ends as well."""
        if not future.cancelled() and (error := future.exception()) is not None:
            _log.error("a job failed by an unexpected error", exc_info=error)
        with self._changed:
            self._leave(pending, False, [False] * len(pending.job.chunks), 0)

    def _leave(self, pending: _Pending, succeeded: bool, done: Sequence[bool], stored_bytes: int) -> None:
        if self._pending.pop(pending.job.job_id, None) is not None:
            self._pending_chunks -= len(pending.job.chunks)
            self._end(pending, succeeded, done, stored_bytes)

    def _end(self, pending: _Pending, succeeded: bool, done: Sequence[bool], stored_bytes: int) -> None:
        seconds = time.monotonic() - pending.since
        self._finished.append(FinishedJob(pending.job, succeeded, tuple(done), stored_bytes, seconds))
        self._changed.notify_all()


def chunk_blocks(
    chunks: Sequence[Chunk], block_ids: Sequence[int], blocks_per_chunk: int, salt: bytes
) -> SequenceBlocks:
    """Return chunks that follow one another as blocks of a sequence, whatever their slots.

    Only the hash of a chunk's last block counts; it stands for the others, which the host does not tell.
    """
    hashes = [chunk.hash for chunk in chunks for _ in range(blocks_per_chunk)]
    return SequenceBlocks(hashes, block_ids, salt, chunks[0].index * blocks_per_chunk)


def slot_blocks(chunks: Sequence[Chunk], blocks_per_chunk: int, salt: bytes) -> SequenceBlocks:
    """Return `chunk_blocks` of a cache whose slots are as many consecutive blocks each as make a chunk."""
    count = blocks_per_chunk
    blocks = [block for chunk in chunks for block in range(chunk.slot * count, (chunk.slot + 1) * count)]
    return chunk_blocks(chunks, blocks, count, salt)


def consecutive_runs(chunks: Sequence[Chunk]) -> Iterator[slice]:
    """Yield where chunks follow each other in their sequence without a gap."""
    start = 0
    for stop in range(1, len(chunks) + 1):
        if stop == len(chunks) or chunks[stop].index != chunks[stop - 1].index + 1:
            yield slice(start, stop)
            start = stop
