"""The tier's counters as vLLM's metrics."""

from __future__ import annotations

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.v1.kv_offload.base import (
    OffloadingCounterMetadata,
    OffloadingGaugeMetadata,
    OffloadingMetricMetadata,
)

from dynamo_kvtc.observability import Counters
from dynamo_kvtc.pipeline.chunk_store import ChunkStore

__all__ = ["TierMetrics", "metric_definitions"]

_COUNTERS: dict[str, str] = {
    "vllm:kvtc_offloaded_chunks": "Chunks encoded and stored by the compressed tier.",
    "vllm:kvtc_offloaded_raw_bytes": "Their size in vLLM's cache, in bytes.",
    "vllm:kvtc_offloaded_stored_bytes": "Their size as stored, headers included, in bytes.",
    "vllm:kvtc_onboarded_chunks": "Chunks decoded into host memory by the compressed tier.",
    "vllm:kvtc_onboarded_stored_bytes": "Their size as stored, in bytes.",
    "vllm:kvtc_lookups": "Chunks that the compressed tier was asked for.",
    "vllm:kvtc_hits": "Chunks asked for that it held.",
    "vllm:kvtc_refused_jobs": "Jobs turned away because too many chunks were on their way.",
}

_BY_REASON: dict[str, str] = {
    "vllm:kvtc_dropped_chunks": "Chunks not stored, by reason.",
    "vllm:kvtc_missed_chunks": "Chunks held and not loaded, by reason; vLLM recomputed them.",
}

_PENDING = "vllm:kvtc_pending_jobs"


def metric_definitions() -> dict[str, OffloadingMetricMetadata]:
    """Return what vLLM has to know about the metrics of `TierMetrics`."""
    definitions: dict[str, OffloadingMetricMetadata] = {
        name: OffloadingCounterMetadata(documentation=text) for name, text in _COUNTERS.items()
    }
    for name, text in _BY_REASON.items():
        definitions[name] = OffloadingCounterMetadata(documentation=text, labelnames=("reason",))
    definitions[_PENDING] = OffloadingGaugeMetadata(documentation="Jobs of the compressed tier in progress.")
    return definitions


class TierMetrics:
    """Turns counters that only grow into the differences that vLLM collects."""

    def __init__(self) -> None:
        self.lookups = self.hits = 0
        self._before: dict[tuple[str, str], int] = {}
        self._pending_before = 0

    def take(self, counters: Counters, store: ChunkStore) -> OffloadingConnectorStats | None:
        """Return what has changed since the last call, or None."""
        now = counters.snapshot()
        values: dict[tuple[str, str], int] = {
            ("vllm:kvtc_offloaded_chunks", ""): now.offloaded_blocks,
            ("vllm:kvtc_offloaded_raw_bytes", ""): now.offloaded_raw_bytes,
            ("vllm:kvtc_offloaded_stored_bytes", ""): now.offloaded_stored_bytes,
            ("vllm:kvtc_onboarded_chunks", ""): now.onboarded_blocks,
            ("vllm:kvtc_onboarded_stored_bytes", ""): now.onboarded_stored_bytes,
            ("vllm:kvtc_lookups", ""): self.lookups,
            ("vllm:kvtc_hits", ""): self.hits,
            ("vllm:kvtc_refused_jobs", ""): store.refused_jobs,
        }
        for reason, count in now.dropped_blocks.items():
            values["vllm:kvtc_dropped_chunks", reason] = count
        for reason, count in now.missed_blocks.items():
            values["vllm:kvtc_missed_chunks", reason] = count
        stats = OffloadingConnectorStats()
        for (name, label), value in values.items():
            if grown := value - self._before.get((name, label), 0):
                stats.increase_counter(name, grown, (label,) if label else ())
        self._before = values
        if (pending := store.pending_jobs) != self._pending_before:
            stats.set_gauge(_PENDING, pending)
            self._pending_before = pending
        return None if stats.is_empty() else stats
