"""A status as flat numbers, and how they change: for hosts that carry metrics from process to process.

A key is a metric's name without its prefix, then its label values: ``missed_blocks_total|damaged``. A
histogram is the three series that it is scraped as: ``onboard_seconds_bucket|0.5``, ``onboard_seconds_sum``
and ``onboard_seconds_count``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

from dynamo_kvtc.observability.metrics import METRICS, PREFIX, metric_families

__all__ = ["SEPARATOR", "Changes", "Series", "flat_series", "flat_values"]

#: Between a name and its label values; in none of them.
SEPARATOR = "|"


@dataclass(frozen=True, slots=True)
class Series:
    """One name under which values are scraped.

    Attributes
    ----------
    name : str
        Without the prefix; of counters with ``_total``.
    kind : str
        ``part`` is a series of a histogram: it only grows, but is no counter by its name.
    """

    name: str
    kind: Literal["counter", "gauge", "part"]
    help: str
    labels: tuple[str, ...]


def flat_series() -> list[Series]:
    """Return every name that `flat_values` may have keys of, in the order of the reference."""
    found = []
    for metric in METRICS:
        name = metric.name.removeprefix(PREFIX)
        if metric.kind == "histogram":
            found += [
                Series(f"{name}_bucket", "part", metric.help, (*metric.labels, "le")),
                Series(f"{name}_sum", "part", metric.help, metric.labels),
                Series(f"{name}_count", "part", metric.help, metric.labels),
            ]
        else:
            found.append(Series(name, metric.kind, metric.help, metric.labels))
    return found


def flat_values(status: Mapping[str, Any]) -> dict[str, float]:
    """Return the values of a status, as `AdapterStatus.to_dict` gives it, by key."""
    values: dict[str, float] = {}
    for family in metric_families(status):
        name = family.metric.name.removeprefix(PREFIX)
        for labels, value in family.samples:
            if family.metric.kind != "histogram":
                values[SEPARATOR.join((name, *labels))] = value
                continue
            for part, label, number in _parts(value):
                values[SEPARATOR.join((f"{name}_{part}", *labels, *label))] = number
    return values


def _parts(histogram: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, ...], float]]:
    counts = list(accumulate(histogram["counts"]))
    for bound, count in zip((*histogram["bounds"], "+Inf"), counts, strict=True):
        yield "bucket", (str(bound),), count
    yield "sum", (), histogram["sum"]
    yield "count", (), counts[-1]


class Changes:
    """Turns statuses into what has changed since the one before."""

    def __init__(self) -> None:
        self._before: dict[str, float] = {}
        self._gauges = frozenset(series.name for series in flat_series() if series.kind == "gauge")

    def take(self, status: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
        """Return by how much each growing value has grown, and the gauges that have another value now.

        What appears for the first time is told even if it is 0.
        """
        values = flat_values(status)
        changed = {key: value for key, value in values.items() if value != self._before.get(key)}
        now = {key: value for key, value in changed.items() if key.split(SEPARATOR)[0] in self._gauges}
        grown = {key: value - self._before.get(key, 0) for key, value in changed.items() if key not in now}
        self._before.update(values)
        return grown, now
