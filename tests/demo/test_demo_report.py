"""The demo's table, JSON and plots, from a made-up report; the demo itself runs in CI."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table
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
from dynamo_kvtc.demo.tables import quality_table, serving_table
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
    row = EvaluationRow(
        profile="kvtc",
        nominal_ratio=16.0,
        ratio=18.9,
        ratio_total=5.8,
        kl=0.0116,
        kl_low=0.0101,
        kl_high=0.0131,
        top1=0.944,
        top1_low=0.93,
        top1_high=0.96,
        nll=2.9,
        nll_delta=0.008,
        nll_delta_low=0.001,
        nll_delta_high=0.015,
        key_error=0.228,
        value_error=0.335,
        encode_tokens_per_s=7000.0,
        decode_tokens_per_s=6000.0,
    )
    rows = [
        replace(row, profile="rd", nominal_ratio=nominal, ratio=nominal, kl=kl, kl_low=kl, kl_high=2 * kl)
        for nominal, kl in ((20.0, 0.0029), (80.0, 0.0464))
    ]
    kvtc = EvaluationReport("LlamaForCausalLM", "bfloat16", "ab" * 32, EvaluationProtocol(), 2.9, (row,))
    quality = {"rd": replace(kvtc, artifact_id="cd" * 32, rows=tuple(rows)), "kvtc": kvtc}
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
    return DemoReport(
        model="SmolLM2-135M-Instruct",
        token_bytes=23_040,
        profile="rd",
        nominal_ratio=20.0,
        artifact_id="cd" * 32,
        calibration_s={"rd": 140.0, "kvtc": 75.0},
        serving=serving,
        quality=quality,
    )


def rendered(table: Table) -> str:
    console = Console(width=200, file=open(os.devnull, "w"), record=True)  # noqa: PTH123, SIM115
    console.print(table)
    console.file.close()
    return console.export_text()


def test_the_table_says_everything_that_was_measured(report: DemoReport) -> None:
    text = rendered(serving_table(report))
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
        "profile rd at 20x",
    ):
        assert shown in text, shown


def test_the_profiles_stand_side_by_side(report: DemoReport) -> None:
    lines = rendered(quality_table(report)).splitlines()
    (kvtc,) = [line for line in lines if "kvtc" in line]
    for shown in ("16x", "18.9x", "1,219", "0.0116 (0.0101 to 0.0131)", "94.4%", "40.0x, 2.1 times fewer"):
        assert shown in kvtc, shown
    assert [line.count("rd") for line in lines if " 20x" in line or " 80x" in line] == [1, 1]
    beyond = replace(report.quality["kvtc"].rows[0], kl=0.05)
    report.quality["kvtc"] = replace(report.quality["kvtc"], rows=(beyond,))
    assert "not measured" in rendered(quality_table(report))


def test_the_json_holds_the_same(report: DemoReport) -> None:
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert plain["serving"]["tiers"][0]["ratio"] == pytest.approx(41_287_680 / 2_282_000)
    assert plain["serving"]["onboards"][1]["intervals"][0]["stage"] == "transfer"
    assert plain["quality"]["kvtc"]["rows"][0]["kl"] == 0.0116
    assert plain["quality"]["rd"]["artifact_id"] == plain["artifact_id"] == "cd" * 32


def test_the_plots_are_pictures(report: DemoReport, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'dynamo-kvtc[demo]'")
    paths = write_plots(report, tmp_path)
    assert [path.name for path in paths] == ["ratio-kl.png", "timeline.png"]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "known"),
    [
        (["--ratio", "16"], "10, 20, 40, 80"),
        (["--profile", "kvtc", "--ratio", "20"], "8, 16, 32"),
        (["--profile", "zip"], "rd, kvtc"),
    ],
)
def test_what_the_demo_does_not_have_is_a_usage_error(
    tmp_path: Path, arguments: list[str], known: str
) -> None:
    result = CliRunner().invoke(app, ["demo", *arguments, "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert known in result.output
