"""The scheduler's side of `KvtcOffloadingSpec`: what is stored, what is promised, what may be forgotten."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm.v1.kv_offload.base import (
    LookupResult,
    Medium,
    OffloadingEvent,
    OffloadingManager,
    OffloadKey,
    OffloadPolicy,
    PrepareStoreOutput,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
    get_offload_block_hash,
)

from dynamo_kvtc.adapters.vllm_offloading.announced import Announced
from dynamo_kvtc.adapters.vllm_offloading.idle import hold_idle_step
from dynamo_kvtc.adapters.vllm_offloading.keys import KeyReader
from dynamo_kvtc.adapters.vllm_offloading.metrics import TierMetrics
from dynamo_kvtc.adapters.vllm_offloading.shared import SharedTiers
from dynamo_kvtc.adapters.vllm_offloading.worker import KvtcLoadStoreSpec
from dynamo_kvtc.pipeline.chunk_store import Chunk, ChunkJob

if TYPE_CHECKING:
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats

__all__ = ["KvtcOffloadingManager"]

#: Steps after which a chunk that was handed over and has not turned up in the tiers is taken for dropped.
_SETTLING_STEPS = 1_000


@dataclass(slots=True)
class _Staged:
    """A chunk in the buffer, or on its way there."""

    chunk: Chunk
    ready: bool = False
    loads: int = 0
    requests: set[str] = field(default_factory=set)


class KvtcOffloadingManager(OffloadingManager):  # type: ignore[misc]  # untyped where vLLM is not installed
    """Answers vLLM's scheduler. No method but `reset_cache` and `shutdown` waits for anything.

    Parameters
    ----------
    shared : SharedTiers
        What the worker's side has opened.
    medium : Medium
        Of the first tier, for KV events.
    events : bool
        Collect KV events.
    """

    def __init__(self, shared: SharedTiers, *, medium: Medium, events: bool) -> None:
        self._shared, self._store, self._medium = shared, shared.store, medium
        self._keys = KeyReader(shared.policy.tier_block_tokens)
        self._metrics = TierMetrics(shared.adapter, shared.store, shared.policy.tier_block_tokens)
        self._job_ids = itertools.count()
        self._staged: OrderedDict[OffloadKey, _Staged] = OrderedDict()
        self._to_load: dict[str, list[OffloadKey]] = {}
        self._jobs: dict[int, list[OffloadKey]] = {}
        self._storing: set[OffloadKey] = set()
        self._settling: dict[OffloadKey, int] = {}
        #: Per request: chunks that failed, and chunks of the buffer that it counts on.
        self._unservable: dict[str, set[OffloadKey]] = {}
        self._counted_on: dict[str, set[OffloadKey]] = {}
        #: Requests that wait: for the buffer in this step, for copies out of it.
        self._awaiting: set[str] = set()
        self._loading: set[str] = set()
        self._announced = Announced(self._event) if events else None

    # --- requests ----------------------------------------------------------------------------------

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        """Ask for all of a request's chunks where the newest are left out at first; see `KvtcTier`."""
        self._unservable[req_context.req_id] = set()
        self._counted_on[req_context.req_id] = set()
        self._store.touch(())
        window = self._shared.policy.recent_window
        policy = OffloadPolicy.REQUEST_LEVEL if window else OffloadPolicy.CHUNK_LEVEL
        return RequestOffloadingContext(policy=policy)

    def on_request_finished(self, req_context: ReqContext) -> None:
        """Let the chunks that a request counted on be forgotten."""
        self._unservable.pop(req_context.req_id, None)
        self._loading.discard(req_context.req_id)
        for key in self._counted_on.pop(req_context.req_id, ()):
            if (staged := self._staged.get(key)) is not None:
                staged.requests.discard(req_context.req_id)

    # --- loading -----------------------------------------------------------------------------------

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """Promise a chunk that is in the buffer; begin to fetch one that is stored."""
        self._collect()
        result = self._look_up(key, req_context)
        if result is LookupResult.HIT_PENDING:
            self._awaiting.add(req_context.req_id)
        # A chunk that is awaited is asked for in every step; it counts once it is decided.
        if result is not LookupResult.HIT_PENDING:
            self._metrics.looked_up(result is LookupResult.HIT)
        return result

    def _look_up(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        index = self._keys.index(key, req_context)
        unservable = self._unservable.get(req_context.req_id)
        if index is None or unservable is None or key in unservable:
            return LookupResult.MISS
        staged = self._staged.get(key) or self._begin(key, index, req_context.req_id)
        if staged is None or staged.chunk.index != index:
            return LookupResult.MISS
        staged.requests.add(req_context.req_id)
        self._counted_on[req_context.req_id].add(key)
        self._staged.move_to_end(key)
        return LookupResult.HIT if staged.ready else LookupResult.HIT_PENDING

    def _begin(self, key: OffloadKey, index: int, req_id: str) -> _Staged | None:
        block_hash = get_offload_block_hash(key)
        nbytes = self._store.size_of(block_hash)
        slot = None if nbytes is None else self._reserve(nbytes)
        if slot is None:
            return None
        staged = self._staged[key] = _Staged(Chunk(block_hash, index, slot))
        self._to_load.setdefault(req_id, []).append(key)
        return staged

    def _reserve(self, nbytes: int) -> int | None:
        """Return a slot; for its room, chunks that nobody counts on are forgotten, longest unused first."""
        if not self._shared.buffer.could_hold(nbytes):
            return None
        slot = self._shared.buffer.reserve(nbytes)
        for key in [] if slot is not None else list(self._staged):
            staged = self._staged[key]
            if staged.ready and not staged.loads and not staged.requests:
                self._forget(key)
                slot = self._shared.buffer.reserve(nbytes)
                if slot is not None:
                    break
        return slot

    def _forget(self, key: OffloadKey) -> None:
        self._shared.buffer.release(self._staged.pop(key).chunk.slot)

    def _collect(self) -> None:
        """Take note of what has arrived in the buffer, and of what has not."""
        for finished in self._store.take_finished():
            for key, ok in zip(self._jobs.pop(finished.job.job_id), finished.done, strict=True):
                if ok:
                    self._staged[key].ready = True
                    continue
                for req_id in self._staged[key].requests:
                    self._unservable[req_id].add(key)
                    self._counted_on[req_id].discard(key)
                self._forget(key)

    def prepare_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> KvtcLoadStoreSpec:
        """Hold promised chunks in the buffer until `complete_load`."""
        chunks = []
        for key in keys:
            staged = self._staged[key]
            staged.loads += 1
            chunks.append(staged.chunk)
        self._loading.add(req_context.req_id)
        return KvtcLoadStoreSpec(chunks)

    def complete_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        """Undo `prepare_load`."""
        self._loading.discard(req_context.req_id)
        for key in keys:
            if (staged := self._staged.get(key)) is not None:
                staged.loads -= 1

    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        """Keep chunks that are in use from being evicted first."""
        hashes = [get_offload_block_hash(key) for key in keys]
        self._store.touch([held for held in hashes if self._store.holds(held)])

    # --- storing -----------------------------------------------------------------------------------

    def prepare_store(
        self, keys: Collection[OffloadKey], req_context: ReqContext
    ) -> PrepareStoreOutput | None:
        """Choose the chunks that are worth storing and not stored or on their way."""
        tokens = self._keys.known_tokens(keys, req_context)
        wanted = self._shared.policy.tier_blocks_to_offload(tokens)
        chosen, chunks = [], []
        for key in keys:
            index = self._keys.index(key, req_context)
            if index is None or index >= wanted or key in self._storing or key in self._settling:
                continue
            block_hash = get_offload_block_hash(key)
            if not self._store.holds(block_hash):
                chosen.append(key)
                chunks.append(Chunk(block_hash, index, 0))
        self._storing.update(chosen)
        return PrepareStoreOutput(chosen, KvtcLoadStoreSpec(chunks, tokens), [])

    def complete_store(
        self, keys: Collection[OffloadKey], req_context: ReqContext, success: bool = True
    ) -> None:
        """Take note that chunks have left vLLM's cache; they can be looked up once the tiers have them."""
        self._storing.difference_update(keys)
        if success:
            self._settling.update(dict.fromkeys(keys, 0))

    # --- steps, reports ----------------------------------------------------------------------------

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        """Begin the loads that this step's lookups asked for, and see what has become of stores."""
        self._collect()
        for keys in self._to_load.values():
            keys.sort(key=lambda key: self._staged[key].chunk.index)
            job_id = next(self._job_ids)
            self._jobs[job_id] = keys
            self._store.submit(ChunkJob(job_id, [self._staged[key].chunk for key in keys], is_load=True))
        self._to_load.clear()
        self._settle()
        if self._announced is not None:
            self._announced.check(lambda key: self._store.holds(get_offload_block_hash(key)))
        hold_idle_step(self._unservable, self._awaiting | self._loading)
        self._awaiting.clear()

    def _settle(self) -> None:
        arrived = [key for key in self._settling if self._store.holds(get_offload_block_hash(key))]
        for key in arrived:
            del self._settling[key]
        if arrived and self._announced is not None:
            self._announced.stored(arrived)
        for key in list(self._settling):
            self._settling[key] += 1
            if self._settling[key] > _SETTLING_STEPS:
                del self._settling[key]

    def has_pending_work(self) -> bool:
        """Tell whether chunks are on their way into the buffer."""
        return bool(self._to_load or self._jobs)

    def take_events(self) -> Iterable[OffloadingEvent]:
        """Return what was stored and what is gone since the last call."""
        return () if self._announced is None else self._announced.take()

    def _event(self, keys: list[OffloadKey], removed: bool) -> OffloadingEvent:
        return OffloadingEvent(keys=keys, medium=self._medium, removed=removed, removal_expected=True)

    def get_stats(self) -> OffloadingConnectorStats | None:
        """Return what has changed since the last call."""
        return self._metrics.take()

    def reset_cache(self) -> None:
        """Forget everything: vLLM may be about to change the model's weights."""
        self._store.drain(120.0)
        self._collect()
        self._to_load.clear()
        self._awaiting.clear()
        self._loading.clear()
        self._staged.clear()
        self._shared.buffer.clear()
        self._storing.clear()
        self._settling.clear()
        for noted in (*self._unservable.values(), *self._counted_on.values()):
            noted.clear()
        self._shared.adapter.reset()

    def shutdown(self) -> None:
        """Close the tiers. Idempotent."""
        self._shared.close()
