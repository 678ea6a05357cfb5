"""Bases in fp8: what they are rounded to, and the comparison on a tiny model, where figures mean nothing."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dynamo_kvtc.calibration.artifact import Artifact
from dynamo_kvtc.calibration.models import LoadedModel
from dynamo_kvtc.data import HELDOUT_TEXTS
from dynamo_kvtc.evaluation import EvaluationProtocol
from dynamo_kvtc.evaluation.run import read_documents


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("fp8_basis")


def _nearest_e4m3(weights: torch.Tensor) -> torch.Tensor:
    """The nearest of all finite numbers of e4m3, scaled: slow and obvious. Float64 ``[elements]``."""
    numbers = torch.tensor(
        [(fraction / 8 + 1) * 2.0**exponent for exponent in range(-6, 9) for fraction in range(8)][:-1]
        + [fraction / 8 * 2.0**-6 for fraction in range(8)],
        dtype=torch.float64,
    )
    numbers = torch.cat([numbers, -numbers]) * weights.abs().max().double() / 448
    return numbers[(weights.double()[:, None] - numbers).abs().argmin(1)]


def test_e4m3_takes_the_nearest_number(script: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    # Components of many sizes, and elements down to what the format has no normal numbers for.
    weights = torch.randn((5, 300), generator=generator) * torch.logspace(-6, 3, 5)[:, None]
    weights *= torch.logspace(0, -6, 300)
    whole = torch.stack([_nearest_e4m3(row) for row in weights])
    torch.testing.assert_close(script.to_e4m3(weights).double(), whole, rtol=1e-6, atol=0)
    blocks = torch.stack(
        [torch.cat([_nearest_e4m3(part) for part in (row[:128], row[128:256], row[256:])]) for row in weights]
    )
    torch.testing.assert_close(script.to_e4m3_blocks(weights).double(), blocks, rtol=1e-6, atol=0)


def test_both_directions_are_rounded_and_nothing_else(script: ModuleType, any_artifact: Artifact) -> None:
    original = any_artifact.parameters
    parameters = script.rounded(original, (script.to_e4m3, script.to_bfloat16))
    components = torch.tensor([3, 0])
    for group, own in zip(parameters.groups, original.groups, strict=True):
        for side, before in ((group.keys, own.keys), (group.values, own.values)):
            assert type(side) is type(before)
            assert side.basis is before.basis
            assert torch.equal(side.analysis(components), script.to_e4m3(before.analysis(components)))
            assert torch.equal(side.synthesis(components), before.synthesis(components).bfloat16().float())


def test_figures(
    script: ModuleType,
    tiny_model: LoadedModel,
    tiny_artifact: Artifact,
    tiny_rd_artifact: Artifact,
    short_protocol: EvaluationProtocol,
) -> None:
    documents = read_documents(tiny_model, HELDOUT_TEXTS, short_protocol)
    found = script.compare(tiny_model, [tiny_rd_artifact, tiny_artifact], documents, short_protocol)
    assert [(one.profile, one.nominal_ratio, one.bases) for one in found] == [
        *(("rd", ratio, name) for ratio in (4.0, 8.0) for name in script.VARIANTS),
        *(("kvtc", ratio, name) for ratio in (2.5, 4.0) for name in list(script.VARIANTS)[:4]),
    ]
    for one in found:
        if one.bases == script.BASELINE:
            own = one
            assert one.key_error_over == one.kl_over.mean == one.bytes_over.mean == 1
        elif one.bases == "bfloat16":
            assert one.key_error_over == pytest.approx(1, abs=0.01)
        else:
            # Worse, but the same basis still.
            assert 1 < one.key_error_over < 2
        assert one.bytes_over.mean == pytest.approx(own.ratio / one.ratio) == pytest.approx(1, abs=0.01)
        assert one.kl == pytest.approx(sum(one.documents["kl"]) / 2)
        assert one.kl_over.mean == pytest.approx(one.kl / own.kl)
        assert one.top1_change.mean == pytest.approx(one.top1 - own.top1)


def test_script(
    script: ModuleType,
    tiny_folder: Path,
    tiny_artifact: Artifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, table = tmp_path / "result.json", tmp_path / "result.md"
    arguments = ["--artifacts", str(tiny_artifact.folder), "--model", str(tiny_folder), "--documents", "1"]
    monkeypatch.setattr(sys, "argv", ["fp8_basis", *arguments, "--json", str(out), "--markdown", str(table)])
    script.main()

    result = json.loads(out.read_text())
    assert len(result["rows"]) == 8
    assert result["details"]["artifacts"] == {"kvtc": tiny_artifact.parameters.artifact_id.hex()}
    assert {"cpu", "date"} <= set(result["environment"])
    assert len([line for line in table.read_text().splitlines() if line.startswith("| ")]) == 8 + 2
    assert "Bases in fp8" in capsys.readouterr().out
