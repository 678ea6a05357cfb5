"""The Grafana dashboard asks for nothing that a worker does not say."""

from __future__ import annotations

import json
import re
from pathlib import Path

from dynamo_kvtc.observability import METRICS

DASHBOARD = Path(__file__).parents[2] / "k8s" / "chart" / "dashboards" / "dynamo-kvtc.json"


def expressions() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", [])]


def exposed() -> dict[str, tuple[str, ...]]:
    """Every series name with its labels; a histogram has three."""
    found: dict[str, tuple[str, ...]] = {}
    for metric in METRICS:
        if metric.kind == "histogram":
            found.update({f"{metric.name}{end}": () for end in ("_bucket", "_sum", "_count")})
        else:
            found[metric.name] = metric.labels
    return found


def test_every_metric_of_the_dashboard_exists() -> None:
    known = exposed()
    used = {name for text in expressions() for name in re.findall(r"dynamo_kvtc_\w+", text)}
    assert used and used <= set(known)


def test_every_label_of_the_dashboard_exists() -> None:
    known = exposed()
    given = {"namespace", "pod", "le"}  # by Prometheus, from the scrape
    for text in expressions():
        labels = {label for name in re.findall(r"dynamo_kvtc_\w+", text) for label in known[name]} | given
        grouped = {one.strip() for by in re.findall(r"by \(([^)]*)\)", text) for one in by.split(",")}
        selected = set(re.findall(r"[{,]\s*(\w+)\s*(?:=~|!=|=)", text))
        assert grouped | selected <= labels, text


def test_every_question_has_its_row_and_every_panel_a_description() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    rows = [panel["title"] for panel in panels if panel["type"] == "row"]
    assert rows == ["Is it compressing, and how much?", "Is it faster than not?", "Is anything wrong?"]
    assert all(panel["description"] for panel in panels if panel["type"] != "row")
    assert len({panel["id"] for panel in panels}) == len(panels)
