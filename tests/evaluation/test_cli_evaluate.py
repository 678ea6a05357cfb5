from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dynamo_kvtc.calibration.artifact import Artifact
from dynamo_kvtc.cli.app import app
from dynamo_kvtc.data import HELDOUT_TEXTS


def _run(tiny_folder: Path, artifact: Artifact, *extra: str) -> tuple[int, str, str]:
    texts = [str(path) for path in HELDOUT_TEXTS]
    arguments = ["evaluate", "--model", str(tiny_folder), "--artifact", str(artifact.folder)]
    result = CliRunner().invoke(app, [*arguments, "--text", *texts, "--documents", "2", *extra])
    return result.exit_code, result.stdout, result.stderr


def test_json_to_standard_output(tiny_folder: Path, tiny_artifact: Artifact) -> None:
    code, output, _ = _run(tiny_folder, tiny_artifact, "--ratios", "2.5,4", "--json", "-")
    assert code == 0
    report = json.loads(output)
    assert [row["nominal_ratio"] for row in report["rows"]] == [2.5, 4.0]
    assert report["artifact_id"] == tiny_artifact.parameters.artifact_id.hex()
    assert report["protocol"] == {
        "documents": 2,
        "context_tokens": 1024,
        "scored_tokens": 256,
        "sink_tokens": 4,
        "recent_window": 128,
        "tier_block_tokens": 256,
    }


def test_table_json_file_and_plot(tiny_folder: Path, tiny_artifact: Artifact, tmp_path: Path) -> None:
    out, plot = tmp_path / "report.json", tmp_path / "plot.png"
    code, output, _ = _run(
        tiny_folder, tiny_artifact, "--ratios", "4", "--json", str(out), "--plot", str(plot)
    )
    assert code == 0
    assert "positions 4 to 895 of 1024 replaced" in output
    assert json.loads(out.read_text())["rows"][0]["profile"] == "kvtc"
    assert plot.stat().st_size > 0


@pytest.mark.parametrize(
    ("extra", "code", "message"),
    [
        (("--ratios", "many"), 2, "list of ratios"),
        (("--ratios", "0"), 2, "list of ratios"),
        (("--profile", "gzip"), 2, "kvtc, raw"),
        (("--ratios", "7"), 1, "no bit plan"),
        (("--dtype", "float32"), 1, "dtype float32 instead of bfloat16"),
        (("--ratios", "4", "--json", "/absent/report.json"), 1, "cannot write the report"),
    ],
)
def test_what_the_user_can_mend_is_said(
    tiny_folder: Path, tiny_artifact: Artifact, extra: tuple[str, ...], code: int, message: str
) -> None:
    exit_code, _, errors = _run(tiny_folder, tiny_artifact, *extra)
    assert exit_code == code
    assert message in " ".join(errors.replace("│", " ").split())
