"""The scheduler's side of the connector: what to load and what to save, and when."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, field

from vllm.distributed.kv_events import KVCacheEvent
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

from dynamo_kvtc.adapters.vllm.events import EventTranslator
from dynamo_kvtc.adapters.vllm.metadata import KvtcConnectorMetadata, KvtcWorkerMetadata, LoadJob, SaveJob
from dynamo_kvtc.adapters.vllm.settings import ConnectorSettings
from dynamo_kvtc.adapters.vllm.stats import KvtcConnectorStats, SchedulerStats
from dynamo_kvtc.errors import LookupServiceError
from dynamo_kvtc.pipeline.lookup_client import LookupClient, Lookups
from dynamo_kvtc.pipeline.lookup_service import socket_path

__all__ = ["KvtcScheduler", "request_salt"]

_log = logging.getLogger(__name__)

_RESET_TIMEOUT_S = 30.0

#: How long an idle engine is kept making steps for offloads of which nothing is heard.
_EVENT_PATIENCE_S = 60.0


def request_salt(request: Request, model: str) -> bytes:
    """Return what keeps a request's tier blocks apart from others with the same text and block hashes.

    Parameters
    ----------
    model : str
        What distinguishes models; vLLM's block hashes do not.
    """
    lora = request.lora_request
    adapter = None if lora is None else [lora.lora_name, lora.lora_path]
    return json.dumps([model, request.cache_salt or "", adapter]).encode()


@dataclass(slots=True)
class _Tracked:
    """What is known of a request that vLLM has not finished."""

    request: Request
    salt: bytes
    local_tokens: int = 0
    #: Leading tier blocks that are in the tiers or on their way.
    saved: int = 0
    #: Save jobs given to the worker, and how many of them it reads blocks for no more.
    save_jobs: int = 0
    copied_jobs: int = 0
    loading: frozenset[int] = field(default_factory=frozenset)
    is_loading_async: bool = False
    #: A load failed: what the tiers promise for this request is not asked for again.
    no_load: bool = False


class KvtcScheduler:
    """Decides in every step; touches no tensors and waits for nothing but a lookup's first milliseconds."""

    def __init__(self, settings: ConnectorSettings) -> None:
        self._settings = settings
        self._tokens = settings.policy.tier_block_tokens
        self._step = self._tokens // settings.block_size
        self._lookups = Lookups(
            LookupClient(socket_path(settings.service)), timeout_s=settings.lookup_timeout_s
        )
        self._tracked: dict[str, _Tracked] = {}
        self._loads: list[LoadJob] = []
        self._finishing: set[str] = set()
        self._failures = 0
        self._pending, self._pending_until = 0, 0.0
        self._translator = EventTranslator(settings.block_size, self._tokens) if settings.events else None
        self._stats = SchedulerStats()

    # --- loading -----------------------------------------------------------------------------------

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Return how many tokens beyond vLLM's own the tiers can load; see the base class."""
        tracked = self._track(request)
        tracked.local_tokens = num_computed_tokens
        # At least one token is left for vLLM to compute: it needs the logits.
        usable = (request.num_tokens - 1) // self._tokens
        if (
            not self._settings.loads
            or tracked.no_load
            or request.skip_reading_prefix_cache
            or usable * self._tokens <= num_computed_tokens
        ):
            return 0, False
        hashes = request.block_hashes[: usable * self._step]
        found = self._lookups.get(
            request.request_id, hashes, salt=tracked.salt, have_tokens=num_computed_tokens
        )
        if found is None:
            return None, False
        if self._translator is not None:
            self._translator.describe(request, range(found // self._tokens))
        new = min(found, usable * self._tokens) - num_computed_tokens
        return (new, not self._settings.layerwise) if new > 0 else (0, False)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """Queue the load of the tokens that vLLM has taken and made room for."""
        if not num_external_tokens:
            return
        tracked = self._track(request)
        block_size = self._settings.block_size
        stop = tracked.local_tokens + num_external_tokens
        first = tracked.local_tokens // self._tokens * self._step
        last = -(-stop // self._tokens) * self._step
        (table,) = blocks.get_block_ids()
        local, loaded = tracked.local_tokens // block_size, stop // block_size
        block_ids = tuple(table[block] if local <= block < loaded else -1 for block in range(first, last))
        hashes = tuple(request.block_hashes[first:last])
        job = LoadJob(
            request.request_id,
            first,
            hashes,
            block_ids,
            tracked.salt,
            self._settings.layerwise,
            request.priority,
        )
        self._loads.append(job)
        tracked.loading = frozenset(block for block in block_ids if block >= 0)
        tracked.is_loading_async = not self._settings.layerwise
        tracked.saved = max(tracked.saved, stop // self._tokens)

    # --- saving ------------------------------------------------------------------------------------

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KvtcConnectorMetadata:
        """Return the step's jobs and begin to collect the next one's."""
        preempted = set(scheduler_output.preempted_req_ids or ())
        for req_id in preempted:
            if (tracked := self._tracked.get(req_id)) is not None:
                # The worker settles or gives up what it was copying; the rest is offered again.
                tracked.saved = 0
        saves = [
            job
            for req_id, tokens in scheduler_output.num_scheduled_tokens.items()
            if (job := self._next_save(req_id, tokens, scheduler_output)) is not None
        ]
        loads, self._loads = self._loads, []
        finishing, self._finishing = self._finishing, set()
        return KvtcConnectorMetadata(
            loads,
            saves,
            preempted,
            finishing,
            self._failures,
            computes=bool(scheduler_output.num_scheduled_tokens),
            prefill_tokens=0 if loads else self._prefill_tokens(scheduler_output),
        )

    def _prefill_tokens(self, output: SchedulerOutput) -> int:
        """Return how many prompt tokens a step computes, or 0 if it computes anything else."""
        tokens = 0
        for req_id, scheduled in output.num_scheduled_tokens.items():
            tracked = self._tracked.get(req_id)
            if tracked is None:
                return 0
            request = tracked.request
            if request.num_computed_tokens + scheduled > request.num_prompt_tokens:
                return 0
            tokens += scheduled
        return tokens

    def _next_save(self, req_id: str, scheduled: int, output: SchedulerOutput) -> SaveJob | None:
        tracked = self._tracked.get(req_id)
        if tracked is None or not self._settings.saves:
            return None
        request = tracked.request
        # Hashes cover accepted tokens only, so drafts that may yet be rejected are never saved.
        complete = min(
            request.num_computed_tokens + scheduled, len(request.block_hashes) * self._settings.block_size
        )
        stop = min(complete // self._tokens, self._settings.policy.tier_blocks_to_offload(request.num_tokens))
        if stop <= tracked.saved:
            return None
        state = output.kv_connector_block_state
        tables = state.get_block_ids(req_id) if state is not None else None
        if tables is None:
            return None
        if self._translator is not None:
            self._translator.describe(request, range(tracked.saved, stop))
        first, last = tracked.saved * self._step, stop * self._step
        tracked.saved = stop
        tracked.save_jobs += 1
        return SaveJob(
            req_id,
            first,
            tuple(request.block_hashes[first:last]),
            tuple(tables[0][first:last]),
            tracked.salt,
            request.num_tokens,
            request.priority,
        )

    # --- what comes back ---------------------------------------------------------------------------

    def update_connector_output(self, output: KVConnectorOutput) -> None:
        """Take in what the worker reports of a step."""
        invalid = output.invalid_block_ids
        if invalid:
            for tracked in self._tracked.values():
                if tracked.loading & invalid:
                    tracked.no_load = True
        for req_id in output.finished_recving or ():
            if (loaded := self._tracked.get(req_id)) is not None:
                loaded.loading, loaded.is_loading_async = frozenset(), False
                if loaded.no_load:
                    loaded.saved = 0
        report = output.kv_connector_worker_meta
        if not isinstance(report, KvtcWorkerMetadata):
            return
        if report.pending != self._pending or report.events:
            self._pending, self._pending_until = report.pending, time.monotonic() + _EVENT_PATIENCE_S
        if self._translator is not None:
            self._translator.add(report.events)
        for req_id, jobs in report.copied.items():
            if (copied := self._tracked.get(req_id)) is not None:
                copied.copied_jobs = jobs
        if report.failures > self._failures:
            # vLLM has rolled the affected requests back; their blocks are computed, and offered, again.
            self._failures = report.failures
            for tracked in self._tracked.values():
                tracked.saved = 0

    def request_finished(self, request: Request) -> bool:
        """Return whether vLLM has to keep the request's blocks until they are copied out."""
        self._lookups.forget(request.request_id)
        tracked = self._tracked.pop(request.request_id, None)
        self._loads = [job for job in self._loads if job.req_id != request.request_id or not job.layerwise]
        # A request that is aborted while it loads is released when the worker reports the load as ended.
        if tracked is None or tracked.is_loading_async or tracked.copied_jobs >= tracked.save_jobs:
            return False
        self._finishing.add(request.request_id)
        return True

    def has_pending_push_work(self) -> bool:
        """Tell whether vLLM should go on making steps: events of offloads come with them."""
        return self._pending > 0 and time.monotonic() < self._pending_until

    def take_events(self) -> list[KVCacheEvent]:
        """Return the KV events since the last call."""
        return self._translator.take() if self._translator is not None else []

    def stats(self) -> KvtcConnectorStats | None:
        """Return what this side has counted since the last call."""
        return self._stats.take(self._lookups.failed)

    def reset_cache(self) -> bool:
        """Let the tiers forget everything; returns whether they have."""
        for tracked in self._tracked.values():
            tracked.saved = 0
        try:
            self._lookups.reset(timeout_s=_RESET_TIMEOUT_S)
        except LookupServiceError as error:
            _log.error("the tiers were not reset: %s", error)
            return False
        return True

    def shutdown(self) -> None:
        """End the lookups."""
        self._lookups.close()

    def _track(self, request: Request) -> _Tracked:
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            tracked = self._tracked[request.request_id] = _Tracked(
                request, request_salt(request, self._settings.model)
            )
        return tracked
