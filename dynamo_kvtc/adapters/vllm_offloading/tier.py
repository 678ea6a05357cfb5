"""`KvtcTier`: chunks of vLLM's host memory out into compressed tiers, and back."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from vllm.v1.kv_offload.base import (
    Locality,
    LookupResult,
    Medium,
    OffloadingEvent,
    OffloadingMetricMetadata,
    OffloadKey,
    OffloadPolicy,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
    get_offload_block_hash,
)
from vllm.v1.kv_offload.tiering.backpressure import BackpressureDetector
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

from dynamo_kvtc.adapters.vllm_offloading.announced import Announced
from dynamo_kvtc.adapters.vllm_offloading.idle import hold_idle_step
from dynamo_kvtc.adapters.vllm_offloading.keys import KeyReader
from dynamo_kvtc.adapters.vllm_offloading.metrics import TierMetrics, metric_definitions
from dynamo_kvtc.adapters.vllm_offloading.settings import (
    check_layout,
    model_cache,
    page_places,
    read_config,
    refuse_unknown,
)
from dynamo_kvtc.errors import ConfigError, KvtcError
from dynamo_kvtc.pipeline.assemble import open_adapter
from dynamo_kvtc.pipeline.chunk_store import Chunk, ChunkJob, ChunkStore, FinishedJob
from dynamo_kvtc.pipeline.row_cache import RowCache
from dynamo_kvtc.pipeline.threaded import ThreadedTierAdapter

if TYPE_CHECKING:
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
    from vllm.v1.kv_offload.base import OffloadingSpec

__all__ = ["KvtcTier"]

_log = logging.getLogger(__name__)

#: Longest that opening or closing the tiers may take.
_OPEN_TIMEOUT_S = 300.0

#: Added to the deadlines of everything in work, which are the ones that count, when all of it is awaited.
_MARGIN_S = 10.0

_SETTINGS = ("config", "locality", "enable_kv_events", "attention_backend", "backpressure")


class KvtcTier(SecondaryTierManager):  # type: ignore[misc]  # untyped where vLLM is not installed
    """A secondary tier that keeps chunks compressed, in the tiers of a dynamo_kvtc configuration.

    Every method but `drain_jobs` and `shutdown` returns without waiting: jobs run on an event loop and
    threads of their own.

    Parameters
    ----------
    config : str
        Path of the dynamo_kvtc configuration file (YAML).
    locality : str, optional
        ``LOCAL`` or ``REMOTE``, for KV events and request filters.
    enable_kv_events : bool
        Tell vLLM's KV events which chunks are stored and which are gone.
    attention_backend : str, optional
        vLLM's attention backend; needed on GPUs, where it decides the order within a page.

    Raises
    ------
    ConfigError, LayoutError, ArtifactError, RopeError
        If the tier cannot serve this cache; vLLM does not start then.
    """

    medium: ClassVar[Medium | None] = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: OffloadingSpec,
        primary_kv_view: memoryview,
        tier_type: str,
        config: str | None = None,
        locality: str | None = None,
        enable_kv_events: bool = False,
        attention_backend: str | None = None,
        backpressure_detector: BackpressureDetector | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        refuse_unknown(unknown, _SETTINGS)
        check_layout(offloading_spec)
        if locality not in (None, *Locality.__members__):
            raise ConfigError(f"locality is {' or '.join(Locality.__members__)}, not {locality!r}")
        self.locality = Locality(locality) if locality is not None else None
        group = offloading_spec.config.groups[0]
        chunk_tokens: int = group.tokens_per_block * offloading_spec.config.cache.blocks_per_chunk
        settings = read_config(config, chunk_tokens)
        model = model_cache(offloading_spec, needs_rope=settings.codec.profile != "raw")
        places = page_places(model, attention_backend, blocks=model.blocks_per_chunk)
        cache = self._cache = RowCache(primary_kv_view, model.geometry, places, model.layer_order)
        self._keys = KeyReader(chunk_tokens)
        self._window = settings.policy.recent_window
        self._job_timeout_s = settings.pipeline.onboard_timeout + settings.transfer.timeout + _MARGIN_S
        self._unservable: dict[str, set[OffloadKey]] = {}
        self._vllm_jobs: dict[int, TransferJob] = {}
        events = enable_kv_events and offloading_spec.kv_events_config.enable_kv_cache_events
        self._announced = Announced(self._event) if events else None
        try:
            self._adapter = ThreadedTierAdapter(
                lambda: open_adapter(settings, cache.geometry, chunk_tokens, model.rope),
                timeout_s=_OPEN_TIMEOUT_S,
            )
        except BaseException:
            cache.release()
            raise
        self._store = ChunkStore(
            self._adapter,
            cache,
            salt=model.salt,
            # Twice the queue: one for each direction.
            max_pending=2 * settings.pipeline.offload_queue,
            load_timeout_s=settings.pipeline.onboard_timeout,
        )
        self._metrics = TierMetrics(self._adapter, self._store, chunk_tokens)
        _log.info(
            "compressed tier for chunks of %d tokens of %s, profile %s",
            chunk_tokens,
            cache.geometry,
            settings.codec.profile,
        )

    # --- lookups -----------------------------------------------------------------------------------

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        """Tell whether a chunk is stored and can be put in place for this request."""
        found = (
            self._keys.index(key, req_context) is not None
            and key not in self._unservable.get(req_context.req_id, ())
            and self._store.holds(get_offload_block_hash(key))
        )
        self._metrics.looked_up(found)
        return LookupResult.HIT if found else LookupResult.MISS

    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        """Keep chunks that are in use from being evicted first."""
        hashes = [get_offload_block_hash(key) for key in keys]
        self._store.touch([held for held in hashes if self._store.holds(held)])

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        """Ask for all of a request's chunks where the newest are left out at first.

        Chunks inside the recent window are not stored. A later, longer request has them outside of its
        window; it finds them in host memory, and only this policy offers them to the tier again.
        """
        self._unservable[req_context.req_id] = set()
        self._store.touch(())
        policy = OffloadPolicy.REQUEST_LEVEL if self._window else OffloadPolicy.CHUNK_LEVEL
        return RequestOffloadingContext(policy=policy)

    def on_request_finished(self, req_context: ReqContext) -> None:
        """Forget what was noted about a request."""
        self._unservable.pop(req_context.req_id, None)

    # --- jobs --------------------------------------------------------------------------------------

    def submit_store(self, job_metadata: TransferJob) -> None:
        """Begin to encode and store chunks."""
        self._submit(job_metadata)

    def submit_load(self, job_metadata: TransferJob) -> None:
        """Begin to decode chunks into their rows."""
        self._submit(job_metadata)

    def _submit(self, job: TransferJob) -> None:
        chunks = []
        for key, row in zip(job.keys, job.chunk_ids, strict=True):
            index = self._keys.index(key, job.req_context)
            block_hash = get_offload_block_hash(key)
            if index is not None and (job.is_promotion or not self._store.holds(block_hash)):
                chunks.append(Chunk(block_hash, index, int(row)))
        chunks.sort(key=lambda chunk: chunk.index)
        self._vllm_jobs[job.job_id] = job
        tokens = 0 if job.is_promotion else self._keys.known_tokens(job.keys, job.req_context)
        self._store.submit(ChunkJob(job.job_id, chunks, job.is_promotion, tokens))

    def get_finished_jobs(self) -> Iterable[JobResult]:
        """Return the jobs that have ended since the last call."""
        return [self._result(finished) for finished in self._store.take_finished()]

    def _result(self, finished: FinishedJob) -> JobResult:
        job = self._vllm_jobs.pop(finished.job.job_id)
        done = {chunk.hash for chunk, ok in zip(finished.job.chunks, finished.done, strict=True) if ok}
        keys = [key for key in job.keys if get_offload_block_hash(key) in done]
        if job.is_promotion:
            # A chunk that failed is a miss for this request from now on, or it would be tried for ever.
            failed = set(job.keys).difference(keys)
            if failed and (noted := self._unservable.get(job.req_context.req_id)) is not None:
                noted |= failed
            return JobResult(
                job.job_id,
                not failed,
                successful_keys=keys,
                transfer_time=finished.seconds,
                transfer_bytes=len(keys) * self.block_size_bytes,
            )
        if self._announced is not None:
            self._announced.stored(keys)
        return JobResult(
            job.job_id,
            finished.succeeded,
            transfer_time=finished.seconds,
            transfer_bytes=finished.stored_bytes,
        )

    def drain_jobs(self) -> None:
        """Wait until no job is in progress. Every wait below has a deadline, and so has this one."""
        waves = 1 + self._store.pending_jobs
        self._store.drain(waves * self._job_timeout_s)

    # --- what vLLM collects ------------------------------------------------------------------------

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        """Notice which announced chunks the tiers have evicted, a few at a time; hold back idle steps."""
        if self._announced is not None:
            self._announced.check(lambda key: self._store.holds(get_offload_block_hash(key)))
        promoted = {job.req_context.req_id for job in self._vllm_jobs.values() if job.is_promotion}
        hold_idle_step(self._unservable, promoted)

    def take_events(self) -> Iterable[OffloadingEvent]:
        """Return what was stored and what is gone since the last call."""
        return () if self._announced is None else self._announced.take()

    def _event(self, keys: list[OffloadKey], removed: bool) -> OffloadingEvent:
        return OffloadingEvent(
            keys=keys,
            medium=Medium.STORAGE,
            removed=removed,
            locality=self.locality,
            ownership=self.tier_type,
            removal_expected=True,
        )

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, OffloadingMetricMetadata]:
        """Return the definitions of the tier's metrics."""
        return metric_definitions()

    def get_stats(self) -> OffloadingConnectorStats | None:
        """Return what has changed since the last call."""
        return self._metrics.take()

    def shutdown(self) -> None:
        """End every job, close the tiers, let go of vLLM's memory. Idempotent.

        Raises
        ------
        TransferTimeoutError
            If something may still touch the memory; vLLM keeps it then.
        """
        try:
            self._store.close()
        except KvtcError:
            _log.exception("the compressed tier did not close in time")
            raise
        self._cache.release()
        self._primary_kv_view = memoryview(b"")
