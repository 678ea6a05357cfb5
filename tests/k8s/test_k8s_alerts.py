"""Alert rules: PromQL that parses, metrics and labels that exist, reasons that are counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import promql_parser
import pytest
import yaml

from dynamo_kvtc.observability import METRICS
from dynamo_kvtc.observability.counters import DropReason, MissReason, Outcome
from dynamo_kvtc.observability.metrics import GUARD_STATES

FILE = Path(__file__).parents[2] / "k8s" / "chart" / "files" / "alerts.yaml"
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load(FILE.read_text())["groups"] for rule in group["rules"]
]
#: Labels that Prometheus adds when it scrapes.
SCRAPE = {"namespace", "pod"}
VALUES = {
    ("dynamo_kvtc_dropped_blocks_total", "reason"): get_args(DropReason),
    ("dynamo_kvtc_missed_blocks_total", "reason"): get_args(MissReason),
    ("dynamo_kvtc_onboards_total", "outcome"): get_args(Outcome),
    ("dynamo_kvtc_guard_state", "state"): GUARD_STATES,
    ("dynamo_kvtc_artifact_info", "profile"): ("rd", "kvtc", "raw"),
}


def series() -> dict[str, tuple[str, ...]]:
    made: dict[str, tuple[str, ...]] = {}
    for metric in METRICS:
        ends = ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",)
        made.update({metric.name + end: metric.labels for end in ends})
    return made


def selectors(expression: Any) -> list[Any]:
    """Every vector selector of an expression."""
    if isinstance(expression, promql_parser.VectorSelector):
        return [expression]
    parts = []
    for name in ("lhs", "rhs", "expr", "vector_selector", "vs", "args"):
        inner = getattr(expression, name, None)
        for one in inner if isinstance(inner, list) else [inner]:
            if one is not None:
                parts += selectors(one)
    return parts


@pytest.mark.parametrize("rule", RULES, ids=[rule["alert"] for rule in RULES])
def test_a_rule_asks_for_what_a_worker_says(rule: dict[str, Any]) -> None:
    known = series()
    found = selectors(promql_parser.parse(rule["expr"]))
    assert len(found) == rule["expr"].count("dynamo_kvtc_")
    for selector in found:
        assert selector.name in known
        for matcher in selector.matchers.matchers:
            assert matcher.name in set(known[selector.name]) | SCRAPE, matcher.name
            for value in matcher.value.split("|"):
                assert value in VALUES[selector.name, matcher.name]


@pytest.mark.parametrize("rule", RULES, ids=[rule["alert"] for rule in RULES])
def test_a_rule_says_what_it_means(rule: dict[str, Any]) -> None:
    assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
    assert rule["labels"]["severity"] in ("info", "warning", "critical")
    assert rule["annotations"].keys() == {"summary", "description"}


def test_a_wrong_metric_is_noticed() -> None:
    assert selectors(promql_parser.parse("sum(rate(dynamo_kvtc_x[5m])) > 1"))[0].name not in series()
    with pytest.raises(ValueError):
        promql_parser.parse("sum(rate(dynamo_kvtc_x[5m]) > 1")
