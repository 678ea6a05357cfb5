"""The tiers' metrics in vLLM's connector statistics, hence in its log lines and on its metrics port.

Each metric of docs/metrics.md appears there as ``vllm:kvtc_…`` in place of ``dynamo_kvtc_…``, with vLLM's
labels before its own. (Dynamo passes on what begins with ``vllm:``.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import Counter, Gauge
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from dynamo_kvtc.observability import SEPARATOR, Changes, Series, flat_series

__all__ = ["PREFIX", "KvtcConnectorStats", "KvtcPromMetrics", "SchedulerStats", "WorkerStats"]

#: What every name on vLLM's metrics port begins with.
PREFIX = "vllm:kvtc_"

#: Counted on the scheduler's side, so in no status.
FAILED_LOOKUPS = Series(
    "failed_lookups_total", "counter", "Lookups that failed or took too long and counted as misses.", ()
)

#: Named in a log line if they grew.
_TROUBLE = ("dropped_blocks_total", "missed_blocks_total", "tier_pauses_total", FAILED_LOOKUPS.name)


@dataclass
class KvtcConnectorStats(KVConnectorStats):  # type: ignore[misc]
    """What has changed: ``grown`` by how much, and gauges as they are ``now``, by key of `flat_values`."""

    data: dict[str, Any] = field(default_factory=dict)

    def reset(self) -> None:
        """Forget everything."""
        self.data.clear()

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Add what another worker, or a later step, has counted."""
        grown = self.data.setdefault("grown", {})
        for key, value in other.data.get("grown", {}).items():
            grown[key] = grown.get(key, 0) + value
        self.data.setdefault("now", {}).update(other.data.get("now", {}))
        return self

    def reduce(self) -> dict[str, int | float]:
        """Return what belongs into a log line."""
        grown = self.data.get("grown", {})
        stored = grown.get("offloaded_stored_bytes_total", 0)
        line: dict[str, int | float] = {
            "offloaded tokens": grown.get("offloaded_tokens_total", 0),
            "onboarded tokens": grown.get("onboarded_tokens_total", 0),
        }
        if stored:
            line["ratio"] = round(grown.get("offloaded_raw_bytes_total", 0) / stored, 2)
        trouble = {
            key: value for key, value in grown.items() if value and key.split(SEPARATOR)[0] in _TROUBLE
        }
        line.update(trouble)
        return line

    def is_empty(self) -> bool:
        """Tell whether nothing has changed."""
        return not any(self.data.values())


class WorkerStats:
    """Makes statistics of the worker's statuses."""

    def __init__(self) -> None:
        self._changes = Changes()
        self._counters: Any = None
        self._status: Mapping[str, Any] | None = None

    def take(self, counters: Any, status: Mapping[str, Any]) -> KvtcConnectorStats | None:
        """Return what has changed since the last call, or None.

        Parameters
        ----------
        counters : Snapshot
            Of now.
        status : Mapping
            The latest that there is; what it says of counters is passed over.
        """
        if status is self._status and counters == self._counters:
            return None
        self._counters, self._status = counters, status
        grown, now = self._changes.take({**status, "counters": counters.to_dict()})
        return KvtcConnectorStats(data={"grown": grown, "now": now}) if grown or now else None


class SchedulerStats:
    """Makes statistics of what the scheduler's side counts."""

    def __init__(self) -> None:
        self._failed_lookups = 0

    def take(self, failed_lookups: int) -> KvtcConnectorStats | None:
        """Return what has changed since the last call, or None."""
        grown, self._failed_lookups = failed_lookups - self._failed_lookups, failed_lookups
        return KvtcConnectorStats(data={"grown": {FAILED_LOOKUPS.name: grown}}) if grown else None


class KvtcPromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """The statistics as Prometheus metrics ``vllm:kvtc_…``.

    The series of a histogram are gauges here: vLLM's interface to Prometheus cannot add observations that
    were made elsewhere. Their names and values are those of a histogram, so that queries are the same.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._kinds: dict[str, str] = {}
        self._metrics: dict[str, Any] = {}
        self._totals: defaultdict[tuple[int, str], float] = defaultdict(float)
        for series in (*flat_series(), FAILED_LOOKUPS):
            self._kinds[series.name] = series.kind
            name, labels = PREFIX + series.name, [*labelnames, *series.labels]
            if series.kind == "counter":
                # prometheus_client puts the ending back.
                self._metrics[series.name] = metric_types[Counter](
                    name=name.removesuffix("_total"), documentation=series.help, labelnames=labels
                )
            else:
                # Each API server sees a part of the growth, and any of them the newest value of a gauge.
                self._metrics[series.name] = metric_types[Gauge](
                    name=name,
                    documentation=series.help,
                    labelnames=labels,
                    multiprocess_mode="mostrecent" if series.kind == "gauge" else "livesum",
                )

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add what an engine has counted."""
        engine = self.per_engine_labelvalues[engine_idx]
        for key, value in transfer_stats_data.get("grown", {}).items():
            name, *labels = key.split(SEPARATOR)
            if self._kinds.get(name) == "counter":
                self._metrics[name].labels(*engine, *labels).inc(value)
            elif name in self._metrics:
                self._totals[engine_idx, key] += value
                self._metrics[name].labels(*engine, *labels).set(self._totals[engine_idx, key])
        for key, value in transfer_stats_data.get("now", {}).items():
            name, *labels = key.split(SEPARATOR)
            if name in self._metrics:
                self._metrics[name].labels(*engine, *labels).set(value)
