"""The tiers' metrics as vLLM's offloading metrics.

Each metric of docs/metrics.md appears on vLLM's port as ``vllm:kvtc_…`` in place of ``dynamo_kvtc_…``, as
with the connector. Blocks are vLLM's chunks here, and a lookup asks for one of them. The series of a
histogram are gauges: vLLM's interface cannot add observations that were made elsewhere.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.v1.kv_offload.base import (
    OffloadingCounterMetadata,
    OffloadingGaugeMetadata,
    OffloadingMetricMetadata,
)

from dynamo_kvtc.adapters.vllm.stats import PREFIX
from dynamo_kvtc.observability import SEPARATOR, flat_series, flat_values
from dynamo_kvtc.pipeline.chunk_store import ChunkStore
from dynamo_kvtc.pipeline.status_feed import StatusFeed
from dynamo_kvtc.pipeline.threaded import ThreadedTierAdapter

__all__ = ["PREFIX", "TierMetrics", "metric_definitions"]


_REFUSED, _PENDING = "refused_jobs", "pending_jobs"

#: By name without ending: counted as vLLM's counters, which Prometheus gives ``_total``.
_COUNTERS = {series.name: series for series in flat_series() if series.kind == "counter"}


def metric_definitions() -> dict[str, OffloadingMetricMetadata]:
    """Return what vLLM has to know about the metrics of `TierMetrics`."""
    definitions: dict[str, OffloadingMetricMetadata] = {
        PREFIX + _REFUSED: OffloadingCounterMetadata(
            documentation="Jobs turned away because too many chunks were on their way."
        ),
        PREFIX + _PENDING: OffloadingGaugeMetadata(documentation="Jobs of the compressed tier in progress."),
    }
    for series in flat_series():
        kind = OffloadingCounterMetadata if series.name in _COUNTERS else OffloadingGaugeMetadata
        definitions[_name(series.name)] = kind(documentation=series.help, labelnames=series.labels)
    return definitions


def _name(series: str) -> str:
    return PREFIX + (series.removesuffix("_total") if series in _COUNTERS else series)


class TierMetrics:
    """Tells vLLM what has changed: of counters by how much, of everything else its new value.

    Parameters
    ----------
    chunk_tokens : int
        Tokens of what one lookup asks for.
    """

    def __init__(self, adapter: ThreadedTierAdapter, store: ChunkStore, chunk_tokens: int) -> None:
        self._adapter, self._store, self._chunk_tokens = adapter, store, chunk_tokens
        self._feed = StatusFeed(adapter)
        self._before: dict[str, float] = {}
        self._seen: tuple[Any, ...] = ()

    def looked_up(self, found: bool) -> None:
        """Count a chunk that was asked for."""
        self._adapter.counters.looked_up(1, int(found), self._chunk_tokens, found * self._chunk_tokens)

    def take(self) -> OffloadingConnectorStats | None:
        """Return what has changed since the last call, or None."""
        status, counters = self._feed.latest(), self._adapter.counters.snapshot()
        seen = (id(status), counters, self._store.refused_jobs, self._store.pending_jobs)
        if seen == self._seen:
            return None
        self._seen = seen
        values = flat_values({**status, "counters": counters.to_dict()})
        values |= {_REFUSED: self._store.refused_jobs, _PENDING: self._store.pending_jobs}
        stats = OffloadingConnectorStats()
        for key, value in values.items():
            before = self._before.get(key)
            name, *labels = key.split(SEPARATOR)
            if name in _COUNTERS or name == _REFUSED:
                # A counter that appears with its first growth would hide it from rates: it is told at 0, too.
                if before is None or value != before:
                    stats.increase_counter(_name(name), value - (before or 0), tuple(labels))
            elif value != before:
                stats.set_gauge(_name(name), value, tuple(labels))
        self._before = values
        return None if stats.is_empty() else stats
