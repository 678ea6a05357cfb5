"""The scripts in ``benchmarks/`` run from end to end on a tiny model, where their numbers mean nothing."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from dynamo_kvtc.calibration.artifact import Artifact

_FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize(
    ("script", "variants", "ratio"),
    [
        ("encode_vs_prefill", {"prefill", "gather and encode"}, "encode / prefill"),
        (
            "onboard_vs_recompute",
            {"recompute", "onboard from host", "onboard from disk"},
            "recompute / onboard from disk",
        ),
        (
            "encryption_cost",
            {
                f"{what}, {how}"
                for what in ("offload", "onboard", "tier put", "tier get")
                for how in ("plain", "encrypted")
            },
            "onboard, encrypted / plain",
        ),
        (
            "entropy_cost",
            {
                f"{what}, {name}"
                for what in ("coder encodes", "coder decodes", "encode", "decode")
                for name in ("deflate", "rans")
            },
            "coder decodes, rans / deflate",
        ),
        ("overlap", {"transfer alone", "decode alone", "onboard"}, "onboard / longer half"),
    ],
)
async def test_script(
    tiny_folder: Path,
    any_artifact: Artifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    script: str,
    variants: set[str],
    ratio: str,
) -> None:
    out = tmp_path / "result.json"
    arguments = ["--model", str(tiny_folder), "--artifact", str(any_artifact.folder), "--ratio", "4"]
    arguments += ["--tokens", "512", "--repetitions", "1", "--json", str(out)]
    monkeypatch.syspath_prepend(str(_FOLDER))
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    await importlib.import_module(script).main()

    result = json.loads(out.read_text())
    assert set(result["seconds"]) == variants
    assert all(0 < runs["min"] <= runs["median"] <= runs["max"] for runs in result["seconds"].values())
    assert result["ratios"][ratio]["value"] > 0
    assert result["details"]["tokens"] == 512
    assert result["details"]["profile"] == any_artifact.manifest.profile
    assert result["details"]["stored_bytes"] > 0
    assert "Ratios of medians" in capsys.readouterr().out
