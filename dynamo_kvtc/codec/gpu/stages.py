"""The stages that work on a device goes through, and a clock that times them for measurements.

Nothing is timed unless a clock is set (`GpuDevice.clock`); then two events a stage are recorded on the
codec's stream. A stage's time is that between them: where the host launches too slowly, its idling counts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["DECODE_STAGES", "ENCODE_STAGES", "StageClock"]

#: Stages of encoding, in order.
ENCODE_STAGES = ("gather", "project, quantise, pack", "deflate", "assemble", "copy to host")

#: Stages of decoding, in order.
DECODE_STAGES = ("verify", "copy to device", "inflate", "unpack, dequantise", "inverse product, scatter")


class StageClock:
    """Adds up the time of each stage, by CUDA events or the host's clock; for one thread."""

    def __init__(self) -> None:
        self._spans: list[tuple[str, Any, Any]] = []

    def mark(self, stream: torch.cuda.Stream | None) -> Any:
        """Return the present point of a stream's work."""
        if stream is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(stream)
        return event

    @contextmanager
    def interval(self, stage: str, stream: torch.cuda.Stream | None) -> Iterator[None]:
        """Time what the block puts on the stream as a part of a stage."""
        start = self.mark(stream)
        yield
        self._spans.append((stage, start, self.mark(stream)))

    @staticmethod
    def between(start: Any, stop: Any) -> float:
        """Return the seconds between two marks of one stream; waits for the later one."""
        if isinstance(start, float):
            return float(stop - start)
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3

    def take(self) -> dict[str, float]:
        """Return the seconds of each stage since the last call; waits for the work."""
        seconds: dict[str, float] = {}
        for stage, start, stop in self._spans:
            seconds[stage] = seconds.get(stage, 0.0) + self.between(start, stop)
        self._spans.clear()
        return seconds
