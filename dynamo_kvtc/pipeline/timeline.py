"""What each stage of an onboard did, and when: the evidence for the overlap."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

__all__ = ["Interval", "Timeline"]


@dataclass(frozen=True, slots=True)
class Interval:
    """One piece of work. Times in seconds since the timeline began.

    Attributes
    ----------
    stage : str
        ``"transfer"``, ``"open"`` (checksum, inflate, dequantise) or ``"project"`` (product, RoPE, scatter).
    group : int
        Layer group, or -1 for the headers.
    first_block, num_blocks : int
        Which of the request's tier blocks.
    """

    stage: str
    group: int
    first_block: int
    num_blocks: int
    start: float
    stop: float


@dataclass
class Timeline:
    """Intervals of one onboard."""

    origin: float = field(default_factory=time.perf_counter)
    intervals: list[Interval] = field(default_factory=list)
    layer_ready: dict[int, float] = field(default_factory=dict)

    @contextmanager
    def record(self, stage: str, group: int, first_block: int, num_blocks: int) -> Iterator[None]:
        """Record the time spent in the block, also when it fails. Safe from several threads."""
        start = time.perf_counter() - self.origin
        try:
            yield
        finally:
            stop = time.perf_counter() - self.origin
            self.intervals.append(Interval(stage, group, first_block, num_blocks, start, stop))

    def mark_layer(self, layer: int) -> None:
        """Record that a layer's KV is in place for every token."""
        self.layer_ready[layer] = time.perf_counter() - self.origin

    @property
    def wall_s(self) -> float:
        """Seconds from the start to the end of the last interval."""
        return max((interval.stop for interval in self.intervals), default=0.0)

    def busy_s(self, *stages: str) -> float:
        """Seconds during which at least one interval of these stages (all, if none given) was open."""
        spans = sorted((i.start, i.stop) for i in self.intervals if not stages or i.stage in stages)
        total, end = 0.0, 0.0
        for start, stop in spans:
            total += max(0.0, stop - max(start, end))
            end = max(end, stop)
        return total

    @property
    def overlap(self) -> float:
        """Transfer time plus decode time over wall time: 1 is no overlap, 2 is perfect."""
        busy = self.busy_s("transfer") + self.busy_s("open", "project")
        return busy / self.wall_s if self.wall_s else 1.0
