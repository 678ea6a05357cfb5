"""Prometheus' view of a status: a collector, and its text. Needs the extra ``metrics``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dynamo_kvtc.errors import MissingDependencyError
from dynamo_kvtc.observability.metrics import Family, metric_families

__all__ = ["StatusCollector", "exposition"]


def _client() -> Any:
    try:
        import prometheus_client
        import prometheus_client.core
        import prometheus_client.exposition
    except ImportError as error:
        raise MissingDependencyError(
            "metrics need prometheus_client: pip install 'dynamo-kvtc[metrics]', or leave "
            "observability.metrics_port unset"
        ) from error
    return prometheus_client


class StatusCollector:
    """A custom collector: it reads a fresh status for every scrape and keeps nothing.

    Register it with a host's own registry to expose the metrics through the host's endpoint.

    Parameters
    ----------
    read : Callable
        Gives a status as `AdapterStatus.to_dict` does. What it raises fails the scrape.
    labels : Mapping[str, str]
        Further labels of every sample, such as the host's model name or rank.

    Raises
    ------
    MissingDependencyError
        If prometheus_client is not installed.
    """

    def __init__(
        self, read: Callable[[], Mapping[str, Any]], labels: Mapping[str, str] | None = None
    ) -> None:
        self._client, self._read = _client(), read
        self._labels = dict(labels or {})

    def describe(self) -> list[Any]:
        """Return nothing, so that registering does not read a status."""
        return []

    def collect(self) -> Iterator[Any]:
        """Give prometheus_client's families."""
        for family in metric_families(self._read()):
            yield self._family(family)

    def _family(self, family: Family) -> Any:
        core, metric = self._client.core, family.metric
        names = [*metric.labels, *self._labels]
        extra = list(self._labels.values())
        if metric.kind == "histogram":
            made = core.HistogramMetricFamily(metric.name, metric.help, labels=names)
            for labels, value in family.samples:
                made.add_metric([*labels, *extra], _cumulative(value), value["sum"])
            return made
        kinds = {"counter": core.CounterMetricFamily, "gauge": core.GaugeMetricFamily}
        made = kinds[metric.kind](metric.name, metric.help, labels=names)
        for labels, value in family.samples:
            made.add_metric([*labels, *extra], value)
        return made


def _cumulative(histogram: Mapping[str, Any]) -> list[tuple[str, int]]:
    buckets, total = [], 0
    for bound, count in zip((*histogram["bounds"], "+Inf"), histogram["counts"], strict=True):
        total += count
        buckets.append((str(bound), total))
    return buckets


def exposition(status: Mapping[str, Any], accept: str = "") -> tuple[bytes, str]:
    """Return the body and the content type with which a scrape is answered.

    Parameters
    ----------
    accept : str
        The scraper's ``Accept`` header: OpenMetrics if it asks for that, Prometheus' text format otherwise.
    """
    client = _client()
    registry = client.CollectorRegistry(auto_describe=False)
    registry.register(StatusCollector(lambda: status))
    encode, content_type = client.exposition.choose_encoder(accept)
    return encode(registry), content_type
