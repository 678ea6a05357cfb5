"""The worker's side of `KvtcOffloadingSpec`: chunks out of the engine's cache, promised ones into it."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from vllm.v1.kv_offload.base import GPULoadStoreSpec, LoadStoreSpec, OffloadingWorker, TransferResult

from dynamo_kvtc.adapters.vllm_offloading.shared import SharedTiers
from dynamo_kvtc.errors import KvtcError
from dynamo_kvtc.pipeline.chunk_store import Chunk, chunk_blocks, consecutive_runs
from dynamo_kvtc.pipeline.threaded import ThreadedOffload

__all__ = ["KvtcLoadStoreSpec", "KvtcOffloadingWorker"]

_log = logging.getLogger(__name__)

#: How long vLLM may wait for blocks to be copied out before they are given up.
_PATIENCE_S = 0.1


@dataclass
class KvtcLoadStoreSpec(LoadStoreSpec):  # type: ignore[misc]  # untyped where vLLM is not installed
    """Chunks of a job, in vLLM's order. For loads, a chunk's slot is in the buffer; for stores it is 0."""

    chunks: list[Chunk]
    num_tokens: int = 0


@dataclass(slots=True)
class _Store:
    tickets: list[ThreadedOffload]
    nbytes: int
    since: float = field(default_factory=time.monotonic)

    def is_gathered(self) -> bool:
        return all(ticket.is_gathered() for ticket in self.tickets)


@dataclass(slots=True)
class _Load:
    future: Future[int]
    since: float = field(default_factory=time.monotonic)


class KvtcOffloadingWorker(OffloadingWorker):  # type: ignore[misc]
    """Moves chunks for vLLM's worker. A store has ended when vLLM's blocks are copied out."""

    def __init__(self, shared: SharedTiers) -> None:
        self._shared = shared
        self._stores: dict[int, _Store] = {}
        self._loads: dict[int, _Load] = {}

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        """Begin to gather and encode chunks."""
        assert isinstance(dst_spec, KvtcLoadStoreSpec)
        shared = self._shared
        blocks = [int(block) for block in src_spec.block_ids]
        tickets = []
        if len(blocks) != len(dst_spec.chunks) * shared.blocks_per_chunk:
            _log.warning("a store names %d blocks for %d chunks: dropped", len(blocks), len(dst_spec.chunks))
        else:
            shared.cache.fence()
            for run in consecutive_runs(dst_spec.chunks):
                tickets += self._offload(dst_spec, blocks, run)
        nbytes = len(blocks) * shared.cache.block_size * shared.cache.geometry.token_bytes
        self._stores[job_id] = _Store(tickets, nbytes)
        return True

    def _offload(self, spec: KvtcLoadStoreSpec, blocks: Sequence[int], run: slice) -> list[ThreadedOffload]:
        count = self._shared.blocks_per_chunk
        part = blocks[run.start * count : run.stop * count]
        sequence = chunk_blocks(spec.chunks[run], part, count, self._shared.salt)
        try:
            return [self._shared.adapter.offload(sequence, self._shared.cache, num_tokens=spec.num_tokens)]
        except KvtcError as error:
            _log.warning("an offload could not begin: %s", error)
            return []

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        """Begin to put promised chunks into vLLM's blocks."""
        assert isinstance(src_spec, KvtcLoadStoreSpec)
        count = self._shared.blocks_per_chunk
        blocks = [int(block) for block in dst_spec.block_ids]
        # vLLM may have the first blocks of the first chunk already, and want no more than some of the last.
        skipped = dst_spec.block_indices[0] % count if blocks else 0
        unwanted = len(src_spec.chunks) * count - skipped - len(blocks)
        if unwanted < 0:
            raise AssertionError(f"vLLM loads {len(blocks)} blocks out of {len(src_spec.chunks)} chunks")
        self._shared.cache.fence()
        slots = [chunk.slot for chunk in src_spec.chunks]
        places = [-1] * skipped + blocks + [-1] * unwanted
        self._loads[job_id] = _Load(self._shared.buffer.load(slots, places))
        return True

    def get_finished(self) -> list[TransferResult]:
        """Return what has ended since the last call."""
        now = time.monotonic()
        finished = []
        for job_id in [job_id for job_id, store in self._stores.items() if store.is_gathered()]:
            store = self._stores.pop(job_id)
            finished.append(TransferResult(job_id, True, store.nbytes, now - store.since))
        for job_id in [job_id for job_id, load in self._loads.items() if load.future.done()]:
            load = self._loads.pop(job_id)
            error = load.future.exception()
            if error is not None:
                # vLLM ends the engine then; going on would mean to serve whatever was in these blocks.
                _log.critical("promised chunks could not be put into vLLM's cache", exc_info=error)
                finished.append(TransferResult(job_id, False))
            else:
                finished.append(TransferResult(job_id, True, load.future.result(), now - load.since))
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """Wait until vLLM may overwrite the blocks of stores; what takes too long is given up."""
        deadline = time.monotonic() + _PATIENCE_S
        for job_id in job_ids:
            store, load = self._stores.get(job_id), self._loads.get(job_id)
            while store is not None and not store.is_gathered() and time.monotonic() < deadline:
                time.sleep(0.001)
            if store is not None and not store.is_gathered():
                for ticket in store.tickets:
                    ticket.void()
            if load is not None:
                load.future.exception()

    def shutdown(self) -> None:
        """Close the tiers. Idempotent."""
        self._shared.close()
