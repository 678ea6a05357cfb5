"""The demo's table, JSON and plots, from a made-up report; the demo itself runs in CI."""

import json
import os
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from dynamo_kvtc.cli.app import app
from dynamo_kvtc.demo.measure import (
    Conversation,
    DemoReport,
    Onboard,
    ServingMeasurements,
    TierBytes,
    TimeToFirstToken,
)
from dynamo_kvtc.demo.plots import write_plots
from dynamo_kvtc.demo.tables import report_table
from dynamo_kvtc.evaluation import EvaluationProtocol, EvaluationReport, EvaluationRow
from dynamo_kvtc.pipeline.timeline import Interval


def onboard(disk_bytes_per_s: float | None) -> Onboard:
    intervals = (
        Interval("transfer", -1, 0, 7, 0.0, 0.001),
        Interval("transfer", 0, 0, 2, 0.001, 0.02),
        Interval("open", 0, 0, 2, 0.02, 0.03),
        Interval("transfer", 1, 0, 2, 0.02, 0.04),
        Interval("project", 0, 0, 2, 0.03, 0.05),
    )
    return Onboard(disk_bytes_per_s, 1792, 0.05, 0.04, 0.01, 0.02, 0.035, 1.4, intervals, {0: 0.035, 1: 0.05})


@pytest.fixture
def report() -> DemoReport:
    row = EvaluationRow("kvtc", 16.0, 18.9, 5.8, 0.0116, 0.944, 2.9, 0.008, 0.228, 0.335, 7000.0, 6000.0)
    quality = EvaluationReport("LlamaForCausalLM", "bfloat16", "ab" * 32, EvaluationProtocol(), 2.9, (row,))
    conversation = Conversation(2100, 1792, 308, 59, 0.0134, 0.898, False, 9, 24, "one", "other")
    serving = ServingMeasurements(
        tiers=(
            TierBytes("host0", 7, 1792, 41_287_680, 2_282_000),
            TierBytes("disk1", 7, 1792, 41_287_680, 2_282_000),
        ),
        ratio_without_sinks=18.4,
        ratio_with_sinks=18.1,
        ratio_with_sinks_and_window=5.0,
        time_to_first_token=(TimeToFirstToken(2048, 1792, 2.0, 0.5, 0.4),),
        onboards=(onboard(None), onboard(6.4e6)),
        conversation=conversation,
    )
    return DemoReport("SmolLM2-135M-Instruct", "kvtc", 16.0, "ab" * 32, 75.0, serving, quality)


def test_the_table_says_everything_that_was_measured(report: DemoReport) -> None:
    console = Console(width=200, file=open(os.devnull, "w"), record=True)  # noqa: PTH123, SIM115
    console.print(report_table(report))
    text = console.export_text()
    console.file.close()
    for shown in (
        "bytes in tier host0",
        "bytes in tier disk1",
        "2.2 MiB",
        "18.4x",
        "18.1x",
        "5.0x",
        "5.0x faster",
        "recompute 2.0 s, onboard from host 500.0 ms, from disk 400.0 ms",
        "overlap, disk throttled to 6.4 MB/s",
        "1.40x",
        "0.0134",
        "89.8 %",
        "differs",
        "9 of 24 leading tokens",
        "KL 0.0116, top-1 94.4 %",
    ):
        assert shown in text, shown


def test_the_json_holds_the_same(report: DemoReport) -> None:
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert plain["serving"]["tiers"][0]["ratio"] == pytest.approx(41_287_680 / 2_282_000)
    assert plain["serving"]["onboards"][1]["intervals"][0]["stage"] == "transfer"
    assert plain["quality"]["rows"][0]["kl"] == 0.0116


def test_the_plots_are_pictures(report: DemoReport, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'dynamo-kvtc[demo]'")
    paths = write_plots(report, tmp_path)
    assert [path.name for path in paths] == ["ratio-kl.png", "timeline.png"]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 10_000


def test_a_ratio_without_a_plan_is_a_usage_error(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["demo", "--ratio", "20", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "8, 16, 32" in result.output
