"""A histogram with fixed buckets, as Prometheus understands it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

__all__ = ["SECONDS_BUCKETS", "Histogram"]

#: Upper bounds, in seconds, that suit everything from a hit in host memory to a slow object store.
SECONDS_BUCKETS: tuple[float, ...] = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0),
)


class Histogram:
    """Counts observations by the first bound that they do not exceed. Not thread-safe."""

    def __init__(self, bounds: Sequence[float] = SECONDS_BUCKETS) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count one observation."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def to_dict(self) -> dict[str, Any]:
        """Return ``bounds``, ``counts`` (one more than bounds; not cumulative) and ``sum``."""
        return {"bounds": list(self._bounds), "counts": list(self._counts), "sum": self._sum}
