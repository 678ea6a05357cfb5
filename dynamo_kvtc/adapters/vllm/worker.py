"""The worker's side of the connector: owns the tiers, onboards and offloads."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import KVCacheConfig

from dynamo_kvtc.adapters.vllm.layouts import ordered_layers, paged_cache
from dynamo_kvtc.adapters.vllm.metadata import KvtcConnectorMetadata, KvtcWorkerMetadata, LoadJob, SaveJob
from dynamo_kvtc.adapters.vllm.prefill import PrefillTimer, clock_for
from dynamo_kvtc.adapters.vllm.settings import ConnectorSettings
from dynamo_kvtc.adapters.vllm.stats import KvtcConnectorStats, WorkerStats
from dynamo_kvtc.codec.rope import RopeParameters
from dynamo_kvtc.errors import KvtcError, OnboardError
from dynamo_kvtc.pipeline.adapter import TierAdapter
from dynamo_kvtc.pipeline.assemble import open_adapter
from dynamo_kvtc.pipeline.blocks import SequenceBlocks
from dynamo_kvtc.pipeline.events import EventLog
from dynamo_kvtc.pipeline.lookup_service import LookupService, socket_path
from dynamo_kvtc.pipeline.paged import PagedKvCache
from dynamo_kvtc.pipeline.status_feed import StatusFeed
from dynamo_kvtc.pipeline.threaded import ThreadedOffload, ThreadedOnboard, ThreadedTierAdapter

__all__ = ["KvtcWorker"]

_log = logging.getLogger(__name__)

#: How long a step may wait for blocks of preempted requests to be copied out before they are given up.
_PREEMPTION_PATIENCE_S = 0.1

#: How long a step that computes nothing is held back while something is awaited.
_IDLE_STEP_S = 0.002

#: Added to the onboard's own deadline, which is the one that counts.
_MARGIN_S = 10.0


@dataclass(slots=True)
class _Load:
    job: LoadJob
    onboard: ThreadedOnboard | None
    error: OnboardError | None = None


@dataclass(slots=True)
class _Saves:
    """The save jobs of one request."""

    #: Those that may still read blocks.
    tickets: list[ThreadedOffload] = field(default_factory=list)
    #: How many do not, since the request began, and how many of them have been reported.
    copied: int = 0
    reported: int = 0
    give_up_at: float = 0.0

    def settle(self) -> bool:
        """Count tickets that need their blocks no more; returns whether none is left."""
        waiting = [ticket for ticket in self.tickets if not ticket.is_gathered()]
        self.copied += len(self.tickets) - len(waiting)
        self.tickets = waiting
        return not waiting

    def give_up(self) -> None:
        """Let nothing be stored that is not copied out by now."""
        for ticket in self.tickets:
            ticket.void()
        self.copied += len(self.tickets)
        self.tickets = []


class KvtcWorker:
    """Runs in the process that holds the KV cache. All methods are called by vLLM's worker thread."""

    def __init__(
        self, settings: ConnectorSettings, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig
    ) -> None:
        self._settings = settings
        self._vllm_config, self._kv_cache_config = vllm_config, kv_cache_config
        self._timeout_s = settings.config.pipeline.onboard_timeout + _MARGIN_S
        self._adapter: ThreadedTierAdapter | None = None
        self._service: LookupService | None = None
        self._cache: PagedKvCache | None = None
        self._layers: dict[str, int] = {}
        self._layerwise: list[_Load] = []
        self._async: dict[str, _Load] = {}
        self._failed_blocks: set[int] = set()
        self._failures = 0
        self._saves: defaultdict[str, _Saves] = defaultdict(_Saves)
        self._finishing: set[str] = set()
        #: Whether the present step computes anything.
        self._computes = False
        self._prefill: PrefillTimer | None = None
        self._failures_reported = 0
        self._events: EventLog | None = None
        self._pending: list[ThreadedOffload] = []
        self._pending_reported = 0
        self._stats = WorkerStats()
        self._feed: StatusFeed | None = None

    # --- start and end -----------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Understand the cache's layout, open the tiers and answer lookups from now on."""
        self.shutdown()
        layers = ordered_layers(kv_caches)
        self._layers = {name: index for index, (name, _) in enumerate(layers)}
        cache = self._cache = paged_cache(self._vllm_config, self._kv_cache_config, layers)
        config = self._settings.config
        rope = None
        if config.codec.profile != "raw":
            rope = RopeParameters.from_hf_config(self._vllm_config.model_config.hf_text_config)
        adapter = self._adapter = ThreadedTierAdapter(
            lambda: open_adapter(config, cache.geometry, cache.block_size, rope, device=cache.device),
            timeout_s=300.0,
        )

        self._feed = StatusFeed(adapter)

        async def serve(tiers: TierAdapter) -> LookupService:
            service = LookupService(tiers, socket_path(self._settings.service))
            await service.start()
            return service

        async def watch(tiers: TierAdapter) -> EventLog:
            return tiers.watch()

        most = self._vllm_config.scheduler_config.max_num_batched_tokens
        least = min(self._settings.policy.tier_block_tokens, most)
        self._prefill = PrefillTimer(clock_for(layers[0][1].device), least)
        self._service = adapter.run(serve)
        if self._settings.events:
            self._events = adapter.run(watch)
        _log.info("tiers are open for a cache of %s in blocks of %d tokens", cache.geometry, cache.block_size)

    def shutdown(self) -> None:
        """Close the tiers. Idempotent."""
        adapter, self._adapter = self._adapter, None
        service, self._service = self._service, None
        if adapter is None:
            return
        if service is not None:
            adapter.run(lambda _: service.close())
        adapter.close()

    # --- the step ----------------------------------------------------------------------------------

    def begin_step(self, metadata: KvtcConnectorMetadata) -> None:
        """Take note of what the step is; its forward pass, if it has one, comes next."""
        self._computes = metadata.computes
        self._finishing |= metadata.finishing
        if self._prefill is not None:
            # Decoding for loads takes cores, so what a pass takes meanwhile says little of prefill alone.
            self._prefill.start(0 if self._async else metadata.prefill_tokens)

    def _end_forward(self) -> None:
        """Take note that the forward pass is over; called by whichever hook comes first after it."""
        if self._prefill is None or self._adapter is None:
            return
        self._prefill.stop()
        for tokens, seconds in self._prefill.take():
            self._adapter.prefilled(tokens, seconds)

    # --- loading -----------------------------------------------------------------------------------

    def start_load_kv(self, metadata: KvtcConnectorMetadata) -> None:
        """Begin the step's loads."""
        if not metadata.loads:
            return
        adapter, cache = self._opened()
        cache.fence()
        for job in metadata.loads:
            load = _Load(job, None)
            try:
                load.onboard = adapter.onboard(
                    SequenceBlocks(job.hashes, job.block_ids, job.salt, job.first_block, job.priority), cache
                )
            except KvtcError as error:
                _log.warning("a load could not begin: %s", error)
                load.error = OnboardError(str(error), [(0, 1 << 62)])
            if job.layerwise:
                self._layerwise.append(load)
            else:
                self._async[job.req_id] = load

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Wait until this layer is in place for every request that this step loads layer by layer.

        On a GPU it is the forward pass's stream that waits, not this thread, once decoding is under way.
        """
        if not self._layerwise:
            return
        _, cache = self._opened()
        layer = self._layers.get(layer_name)
        for load in self._layerwise:
            if layer is not None and load.onboard is not None and load.error is None:
                try:
                    load.onboard.layer(layer, self._timeout_s, stream=cache.stream())
                except OnboardError as error:
                    load.error = error

    def _end_layerwise(self) -> None:
        """Wait for what is left of the step's layer-wise loads, and note which failed."""
        for load in self._layerwise:
            if load.onboard is not None:
                try:
                    load.onboard.wait(self._timeout_s)
                except OnboardError as error:
                    load.error = error
            if load.error is not None:
                self._failures += 1
                self._note_failed(load.job, load.error)
        self._layerwise.clear()

    def _note_failed(self, job: LoadJob, error: OnboardError) -> None:
        block_size = self._settings.block_size
        start = job.first_block * block_size
        for offset, block in enumerate(job.block_ids):
            token = start + offset * block_size
            if block >= 0 and any(first <= token < stop for first, stop in error.tokens_to_recompute):
                self._failed_blocks.add(block)

    # --- saving ------------------------------------------------------------------------------------

    def wait_for_save(self, metadata: KvtcConnectorMetadata) -> None:
        """Queue the step's offloads; blocks are copied out in the background."""
        self._end_forward()
        self._end_layerwise()
        if not metadata.saves:
            return
        adapter, cache = self._opened()
        if metadata.failures_seen < self._failures:
            # A load failed in this step, or in one that the scheduler had not heard of: what was computed
            # on top of it is wrong. vLLM computes it again, and the scheduler offers it again.
            for job in metadata.saves:
                self._saves[job.req_id].copied += 1
            return
        cache.fence()
        for job in metadata.saves:
            self._save(adapter, cache, job)

    def _save(self, adapter: ThreadedTierAdapter, cache: PagedKvCache, job: SaveJob) -> None:
        blocks = SequenceBlocks(job.hashes, job.block_ids, job.salt, job.first_block, job.priority)
        try:
            ticket = adapter.offload(blocks, cache, num_tokens=job.num_tokens)
        except KvtcError as error:
            _log.warning("an offload could not begin: %s", error)
            self._saves[job.req_id].copied += 1
            return
        self._saves[job.req_id].tickets.append(ticket)
        if self._events is not None:
            self._pending.append(ticket)

    def handle_preemptions(self, metadata: KvtcConnectorMetadata) -> None:
        """Make sure that nothing is read any more from blocks that are about to be overwritten."""
        deadline = time.monotonic() + _PREEMPTION_PATIENCE_S
        for req_id in metadata.preempted & self._saves.keys():
            saves = self._saves[req_id]
            while not saves.settle() and time.monotonic() < deadline:
                time.sleep(0.001)
            saves.give_up()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str], set[str]]:
        """Return requests whose blocks are copied out, and requests whose loads have ended."""
        # With speculative decoding this comes before `wait_for_save`, and what failed must be told now.
        self._end_forward()
        self._end_layerwise()
        if (self._async or self._pending) and not self._computes:
            # The engine spins while it waits for loads, or events of offloads, alone; the threads that decode
            # and encode need the interpreter and the cores.
            time.sleep(_IDLE_STEP_S)
        for req_id in finished_req_ids & self._async.keys():
            # Nobody waits for it any more; it is reported once it touches its blocks no more.
            onboard = self._async[req_id].onboard
            if onboard is not None:
                onboard.request_cancel()
        for req_id in finished_req_ids - self._finishing:
            self._saves.pop(req_id, None)
        sent = {req_id for req_id in self._finishing if self._is_copied_out(req_id)}
        for req_id in sent:
            self._saves.pop(req_id, None)
        self._finishing -= sent
        received = {
            req_id for req_id, load in self._async.items() if load.onboard is None or load.onboard.done()
        }
        for req_id in received:
            load = self._async.pop(req_id)
            error = load.error or (load.onboard.error() if load.onboard is not None else None)
            if error is not None:
                self._note_failed(load.job, error)
        return sent, received

    def _is_copied_out(self, req_id: str) -> bool:
        saves = self._saves.get(req_id)
        if saves is None:
            return True
        saves.give_up_at = saves.give_up_at or time.monotonic() + self._settings.config.transfer.timeout
        if not saves.settle() and time.monotonic() > saves.give_up_at:
            saves.give_up()
        return not saves.tickets

    # --- reports -----------------------------------------------------------------------------------

    def take_failed_blocks(self) -> set[int]:
        """Return the blocks whose loads failed since the last call."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def report(self) -> KvtcWorkerMetadata | None:
        """Return what the scheduler's side has to know, or None if nothing has changed."""
        copied = {}
        for req_id, saves in self._saves.items():
            saves.settle()
            if saves.copied > saves.reported:
                copied[req_id] = saves.reported = saves.copied
        # Counted before the events are taken: when nothing is pending, no event is missing.
        self._pending = [ticket for ticket in self._pending if not ticket.is_finished()]
        pending = len(self._pending)
        events = tuple(self._events.take()) if self._events is not None else ()
        before = (self._pending_reported, self._failures_reported)
        if not copied and not events and before == (pending, self._failures):
            return None
        self._pending_reported, self._failures_reported = pending, self._failures
        return KvtcWorkerMetadata(pending, self._failures, copied, events)

    def stats(self) -> KvtcConnectorStats | None:
        """Return what has changed in the tiers' metrics since the last call.

        Counters are of now, everything else from up to a second ago: a step does not wait for it.
        """
        if self._adapter is None or self._feed is None:
            return None
        return self._stats.take(self._adapter.counters.snapshot(), self._feed.latest())

    def _opened(self) -> tuple[ThreadedTierAdapter, PagedKvCache]:
        assert self._adapter is not None and self._cache is not None, "vLLM registers its caches first"
        return self._adapter, self._cache
