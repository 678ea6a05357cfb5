"""The pipeline's counters in vLLM's connector statistics, hence in its log lines and on its metrics port."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from prometheus_client import Counter
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from dynamo_kvtc.observability import Snapshot

__all__ = ["KvtcConnectorStats", "KvtcPromMetrics", "StatsSource"]

#: Counters of the snapshot that vLLM publishes, by their name after ``vllm:kvtc_``.
_PLAIN: dict[str, str] = {
    "looked_up_blocks": "Tier blocks asked for in lookups.",
    "found_blocks": "Tier blocks asked for that a tier held.",
    "offloaded_blocks": "Tier blocks stored.",
    "offloaded_tokens": "Tokens stored.",
    "offloaded_raw_bytes": "Size in the cache of what was stored, in bytes.",
    "offloaded_stored_bytes": "Size of what was stored, headers included, in bytes.",
    "onboarded_blocks": "Tier blocks put into the cache.",
    "onboarded_tokens": "Tokens put into the cache.",
    "onboarded_raw_bytes": "Size in the cache of what was put there, in bytes.",
    "onboarded_stored_bytes": "Stored size of what was put into the cache, in bytes.",
}

_BY_REASON: dict[str, str] = {
    "dropped_blocks": "Tier blocks not stored, by reason.",
    "missed_blocks": "Tier blocks found and not put into the cache, by reason; vLLM recomputed them.",
}

#: Counted on the scheduler's side.
_SCHEDULER: dict[str, str] = {"failed_lookups": "Lookups that failed or took too long and counted as misses."}

#: Between a counter's name and its reason in the keys of the statistics.
_SEPARATOR = ":"


@dataclass
class KvtcConnectorStats(KVConnectorStats):  # type: ignore[misc]
    """By how much each counter has grown: ``{"offloaded_tokens": 512, "dropped_blocks:queue_full": 2}``."""

    data: dict[str, Any] = field(default_factory=dict)

    def reset(self) -> None:
        """Forget everything."""
        self.data.clear()

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Add what another worker, or a later step, has counted."""
        for name, grown in other.data.items():
            self.data[name] = self.data.get(name, 0) + grown
        return self

    def reduce(self) -> dict[str, int | float]:
        """Return what belongs into a log line."""
        stored = self.data.get("offloaded_stored_bytes", 0)
        line: dict[str, int | float] = {
            "offloaded tokens": self.data.get("offloaded_tokens", 0),
            "onboarded tokens": self.data.get("onboarded_tokens", 0),
        }
        if stored:
            line["ratio"] = round(self.data.get("offloaded_raw_bytes", 0) / stored, 2)
        line.update(
            {name: grown for name, grown in self.data.items() if name.split(_SEPARATOR)[0] in _TROUBLE}
        )
        return line

    def is_empty(self) -> bool:
        """Tell whether nothing has grown."""
        return not self.data


_TROUBLE = (*_BY_REASON, *_SCHEDULER)


class StatsSource:
    """Turns counters that only grow into their growth since the last call."""

    def __init__(self) -> None:
        self._before: dict[str, int] = {}

    def take(self, now: dict[str, int]) -> KvtcConnectorStats | None:
        """Return the growth since the last call, or None if there is none."""
        grown = {
            name: value - self._before.get(name, 0)
            for name, value in now.items()
            if value != self._before.get(name, 0)
        }
        self._before = now
        return KvtcConnectorStats(data=grown) if grown else None

    @staticmethod
    def flatten(snapshot: Snapshot) -> dict[str, int]:
        """Return the counters of a snapshot under the names of `KvtcConnectorStats`."""
        counters: dict[str, int] = {name: getattr(snapshot, name) for name in _PLAIN}
        for name in _BY_REASON:
            for reason, count in getattr(snapshot, name).items():
                counters[f"{name}{_SEPARATOR}{reason}"] = count
        return counters


class KvtcPromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """The statistics as Prometheus counters ``vllm:kvtc_…``."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        make = metric_types[Counter]
        self._counters = {
            name: make(name=f"vllm:kvtc_{name}", documentation=text, labelnames=labelnames)
            for name, text in {**_PLAIN, **_SCHEDULER}.items()
        }
        self._by_reason = {
            name: make(name=f"vllm:kvtc_{name}", documentation=text, labelnames=[*labelnames, "reason"])
            for name, text in _BY_REASON.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add what an engine has counted."""
        values = self.per_engine_labelvalues[engine_idx]
        for key, grown in transfer_stats_data.items():
            name, _, reason = key.partition(_SEPARATOR)
            if name in self._counters:
                self._counters[name].labels(*values).inc(grown)
            elif name in self._by_reason:
                self._by_reason[name].labels(*values, reason).inc(grown)
