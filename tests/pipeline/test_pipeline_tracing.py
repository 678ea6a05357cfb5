"""Spans of an onboard, collected by OpenTelemetry's own SDK."""

from __future__ import annotations

from pathlib import Path

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from rig import open_rig

from dynamo_kvtc.errors import OnboardError
from dynamo_kvtc.observability import tracing


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    # The global provider can be set once in a process, hence not here.
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    return exporter


async def test_an_onboard_is_a_span_with_its_stages_under_the_callers(
    tmp_path: Path, spans: InMemorySpanExporter
) -> None:
    async with open_rig(tmp_path) as rig:
        blocks = rig.sequence(64)
        await rig.store(blocks)
        with trace.get_tracer("host").start_as_current_span("request") as request:
            await rig.adapter.onboard(blocks, rig.destination).wait()
        found = spans.get_finished_spans()
    (onboard,) = [span for span in found if span.name == "kvtc.onboard"]
    assert onboard.parent is not None and onboard.parent.span_id == request.get_span_context().span_id
    assert onboard.attributes is not None and onboard.attributes["kvtc.tokens"] == 64
    parts = [span for span in found if span.name.startswith("kvtc.") and span is not onboard]
    assert {part.name for part in parts} == {"kvtc.transfer", "kvtc.open", "kvtc.project"}
    for part in parts:
        assert part.parent is not None and part.parent.span_id == onboard.context.span_id
        assert onboard.start_time <= part.start_time <= part.end_time <= onboard.end_time


async def test_a_failed_onboard_is_an_error(tmp_path: Path, spans: InMemorySpanExporter) -> None:
    async with open_rig(tmp_path) as rig:
        with pytest.raises(OnboardError):
            await rig.adapter.onboard(rig.sequence(64), rig.destination).wait()
    (onboard,) = [span for span in spans.get_finished_spans() if span.name == "kvtc.onboard"]
    assert onboard.status.status_code is trace.StatusCode.ERROR


async def test_without_opentelemetry_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_trace", lambda: None)
    async with open_rig(tmp_path) as rig:
        blocks = rig.sequence(64)
        await rig.store(blocks)
        await rig.adapter.onboard(blocks, rig.destination).wait()
