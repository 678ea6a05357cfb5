"""OpenTelemetry spans of one onboard; nothing without the extra ``otel`` or without a host that collects."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

__all__ = ["Part", "prepare_tracing", "trace_onboard"]


class Part(NamedTuple):
    """A piece of an onboard: its name, its times in seconds since the start, and its attributes."""

    name: str
    start: float
    stop: float
    attributes: Mapping[str, int]


@lru_cache
def _trace() -> Any:
    try:
        from opentelemetry import trace
    except ImportError:
        return None
    return trace


def prepare_tracing() -> None:
    """Do what the first span would otherwise do on the event loop: import, and look for a provider (5 ms)."""
    if (trace := _trace()) is not None:
        trace.get_tracer("dynamo_kvtc")


def trace_onboard(
    origin: float, seconds: float, attributes: Mapping[str, Any], parts: Sequence[Part], *, failed: bool
) -> None:
    """Write the span of an onboard that has ended, with one child for each part.

    Written at the end from the times that were taken, so that tracing costs an onboard nothing while it runs.
    The parent is the span that was current when the onboard began.

    Parameters
    ----------
    origin : float
        When it began, on the clock of `time.perf_counter`.
    seconds : float
        How long it took.
    """
    trace = _trace()
    if trace is None:
        return
    tracer = trace.get_tracer("dynamo_kvtc")
    epoch = time.time_ns() - round((time.perf_counter() - origin) * 1e9)
    span = tracer.start_span("kvtc.onboard", start_time=epoch, attributes=dict(attributes))
    if span.is_recording():
        inside = trace.set_span_in_context(span)
        for part in parts:
            child = tracer.start_span(
                f"kvtc.{part.name}",
                context=inside,
                start_time=epoch + round(part.start * 1e9),
                attributes={f"kvtc.{name}": value for name, value in part.attributes.items()},
            )
            child.end(end_time=epoch + round(part.stop * 1e9))
        if failed:
            span.set_status(trace.StatusCode.ERROR)
    span.end(end_time=epoch + round(seconds * 1e9))
