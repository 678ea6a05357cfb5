"""Every metric has its line in the reference, and leaves the process as Prometheus reads it."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from dynamo_kvtc.observability import METRICS, Counters, StatusCollector, exposition, metric_families
from dynamo_kvtc.observability.histogram import Histogram

REFERENCE = Path(__file__).parents[2] / "docs" / "metrics.md"


def status(**more: object) -> dict[str, object]:
    counters = Counters()
    counters.looked_up(8, 6, 2050, 1536)
    counters.offloaded(blocks=2, tokens=512, raw_bytes=3000, stored_bytes=200)
    counters.onboarded(blocks=1, tokens=256, raw_bytes=1500, stored_bytes=100)
    counters.onboard_ended("complete", seconds=0.5, first_layer_s=0.2, transfer_s=0.4, decode_s=0.35)
    counters.failed(ValueError("x"))
    counters.decided("offload", "skip", 3)
    tier = {"objects": 2, "capacity_bytes": 1000, "not_admitted": {"budget": 4}}
    return {
        "version": "0.1.0",
        "artifact": {"id": "ab" * 32, "profile": "rd", "plan": "ratio=20"},
        "counters": counters.snapshot().to_dict(),
        "tiers": {"host0": tier},
        "guard": {"state": "raised", "level": 1, "error_ratio": 1.5, "checks": {"good": 3}, "seconds": 0.1},
        **more,
    }


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_the_reference_lists_exactly_the_metrics_of_the_code() -> None:
    rows = [line for line in REFERENCE.read_text().splitlines() if line.startswith("| `dynamo_kvtc_")]
    assert rows == [
        f"| `{m.name}` | {m.kind} | {', '.join(f'`{label}`' for label in m.labels)} | {m.help} |"
        for m in METRICS
    ]


def test_names_follow_prometheus_conventions_and_are_unique() -> None:
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    for metric in METRICS:
        assert metric.name.startswith("dynamo_kvtc_")
        assert metric.name.endswith("_total") == (metric.kind == "counter")


def test_values_arrive_under_their_names() -> None:
    body, content_type = exposition(status())
    assert content_type.startswith("text/plain")
    found = samples(body.decode())
    artifact = {"artifact_id": "ab" * 32, "profile": "rd", "plan": "ratio=20", "version": "0.1.0"}
    assert found["dynamo_kvtc_artifact_info", tuple(sorted(artifact.items()))] == 1
    assert found["dynamo_kvtc_compression_ratio", ()] == 15
    assert found["dynamo_kvtc_lookup_tokens_total", ()] == 2050
    assert found["dynamo_kvtc_lookup_hit_tokens_total", ()] == 1536
    assert found["dynamo_kvtc_onboard_overlap", ()] == pytest.approx(1.5)
    assert found["dynamo_kvtc_errors_total", (("type", "unexpected"),)] == 1
    assert found["dynamo_kvtc_decisions_total", (("action", "skip"), ("step", "offload"))] == 3
    assert found["dynamo_kvtc_dropped_blocks_total", (("reason", "queue_full"),)] == 0
    assert found["dynamo_kvtc_guard_state", (("state", "raised"),)] == 1
    assert found["dynamo_kvtc_guard_state", (("state", "ok"),)] == 0
    assert found["dynamo_kvtc_tier_not_admitted_total", (("reason", "budget"), ("tier", "host0"))] == 4
    assert found["dynamo_kvtc_onboard_seconds_bucket", (("le", "0.5"),)] == 1
    assert found["dynamo_kvtc_onboard_seconds_bucket", (("le", "0.25"),)] == 0
    assert found["dynamo_kvtc_onboard_seconds_count", ()] == 1


def test_openmetrics_is_served_to_those_who_ask() -> None:
    body, content_type = exposition(status(), "application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")


def test_a_host_adds_its_labels() -> None:
    registry = CollectorRegistry()
    registry.register(StatusCollector(status, labels={"model_name": "m"}))
    assert registry.get_sample_value("dynamo_kvtc_offloaded_blocks_total", {"model_name": "m"}) == 2


def test_what_a_status_lacks_is_no_sample() -> None:
    assert metric_families({}) == []
    names = {family.metric.name for family in metric_families({"counters": Counters().snapshot().to_dict()})}
    assert "dynamo_kvtc_compression_ratio" not in names  # nothing was offloaded
    assert "dynamo_kvtc_offloaded_blocks_total" in names


def test_an_observation_falls_under_the_first_bound_that_it_does_not_exceed() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (1.0, 1.5, 2.5):
        histogram.observe(value)
    assert histogram.to_dict() == {"bounds": [1.0, 2.0], "counts": [1, 1, 1], "sum": 5.0}
