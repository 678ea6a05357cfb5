"""Artifacts of the rd profile: what is written is read back, what is damaged or contradictory is refused."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_rd import random_rd_side, write_random_rd_artifact
from safetensors.torch import load_file, save

from dynamo_kvtc.calibration.artifact import MANIFEST_NAME, PARAMETERS_NAME, Artifact, load_artifact
from dynamo_kvtc.calibration.artifact_writer import FittedRdSide, MeasuredPlan
from dynamo_kvtc.calibration.manifest import Manifest
from dynamo_kvtc.calibration.report import write_report
from dynamo_kvtc.codec.geometry import KvGeometry, LayerRange
from dynamo_kvtc.codec.header import Profile
from dynamo_kvtc.codec.parameters import RdSideParameters
from dynamo_kvtc.errors import ArtifactFormatError, ArtifactMismatchError, CalibrationError

GEOMETRY = KvGeometry(num_layers=3, num_kv_heads=2, head_size=4)
GROUPS = (LayerRange(0, 2), LayerRange(2, 1))


def write(folder: Path, **changes: Any) -> Artifact:
    return write_random_rd_artifact(folder, geometry=GEOMETRY, groups=GROUPS, **changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "artifact").folder


def assert_same(written: FittedRdSide, read: RdSideParameters) -> None:
    assert read.basis.dtype is torch.float32
    assert torch.equal(written.basis.float(), read.basis)
    for name in ("mean", "metric", "importance"):
        assert torch.equal(getattr(written, name), getattr(read, name)), name
    assert read.importance_bias == written.importance_bias
    assert read.plans.keys() == written.plans.keys()
    for plan_id, expected in written.plans.items():
        plan = read.plans[plan_id]
        assert (plan.step, plan.counts, plan.rank) == (expected.step, expected.counts, expected.rank)
        for name in ("components", "rounding", "offsets"):
            assert torch.equal(getattr(plan, name), getattr(expected, name)), name


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_what_is_written_is_read_back(data: st.DataObject) -> None:
    geometry = KvGeometry(
        num_layers=data.draw(st.integers(1, 3)),
        num_kv_heads=data.draw(st.integers(1, 2)),
        head_size=data.draw(st.sampled_from([2, 4, 6])),
    )
    cut = data.draw(st.integers(1, geometry.num_layers))
    groups = [LayerRange(0, cut), LayerRange(cut, geometry.num_layers - cut)][
        : 1 + (cut < geometry.num_layers)
    ]
    plan_ids = data.draw(st.lists(st.integers(0, 255), min_size=1, max_size=3, unique=True))
    basis_dtype = data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    sides = [
        tuple(random_rd_side(geometry, g.count, plan_ids, generator, basis_dtype) for _ in range(2))
        for g in groups
    ]
    ratios = {plan_id: 10.0 + number for number, plan_id in enumerate(plan_ids)}
    figures = st.builds(
        MeasuredPlan, st.floats(1, 1000), st.floats(0, 5), st.floats(0, 1), st.none() | st.integers(0, 1000)
    )
    measured = {plan_id: data.draw(figures) for plan_id in plan_ids}
    with tempfile.TemporaryDirectory() as scratch:
        write_random_rd_artifact(
            Path(scratch), geometry=geometry, groups=groups, sides=sides, ratios=ratios, measured=measured
        )
        artifact = load_artifact(scratch)
    parameters = artifact.parameters
    assert parameters.profile is Profile.RD
    assert parameters.ratios == ratios
    assert parameters.divergences == {plan_id: plan.kl for plan_id, plan in measured.items()}
    assert [group.layers for group in parameters.groups] == groups
    for (keys, values), group in zip(sides, parameters.groups, strict=True):
        assert_same(keys, group.keys)
        assert_same(values, group.values)
    read = {entry.plan_id: entry.measured for entry in artifact.manifest.ratios}
    assert {plan_id: MeasuredPlan(**dict(entry)) for plan_id, entry in read.items()} == measured


def test_plans_are_found_by_ratio_and_by_divergence(folder: Path) -> None:
    parameters = load_artifact(folder).parameters
    assert parameters.plan_id(20.0) == 1
    assert parameters.plan_id_within(0.002) == 0
    assert parameters.plan_id_within(1.0) == 1
    with pytest.raises(ArtifactMismatchError, match="it has 10, 20"):
        parameters.plan_id(16.0)


def test_the_id_covers_what_was_measured(tmp_path: Path) -> None:
    first, again = write(tmp_path / "a"), write(tmp_path / "b")
    other = write(tmp_path / "c", measured=dict.fromkeys((0, 1), MeasuredPlan(11.0, kl=0.002, top1=0.98)))
    assert first.manifest.id == again.manifest.id != other.manifest.id
    assert (tmp_path / "a" / MANIFEST_NAME).read_bytes() == (tmp_path / "b" / MANIFEST_NAME).read_bytes()


def test_ratios_may_share_a_plan(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    layers = LayerRange(0, GEOMETRY.num_layers)
    keys, values = (random_rd_side(GEOMETRY, layers.count, [0, 1], generator) for _ in range(2))
    shared = replace(keys, plans=dict.fromkeys((0, 1), keys.plans[0]))
    artifact = write_random_rd_artifact(
        tmp_path, geometry=GEOMETRY, groups=[layers], sides=[(shared, values)]
    )
    assert_same(shared, artifact.parameters.groups[0].keys)


@pytest.mark.parametrize("plan_ids", [(), (0,), (0, 1, 7)])
def test_every_plan_is_measured_and_no_other(tmp_path: Path, plan_ids: tuple[int, ...]) -> None:
    with pytest.raises(CalibrationError, match="were measured"):
        write(tmp_path, measured=dict.fromkeys(plan_ids, MeasuredPlan(11.0, kl=0.002, top1=0.98)))


@pytest.mark.parametrize("name", [MANIFEST_NAME, PARAMETERS_NAME])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_every_flipped_bit_is_found_or_harmless(
    name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / f"flipped-{name}"
    before = write(folder).manifest
    path = folder / name
    damaged = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(damaged) - 1))
    damaged[position] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(bytes(damaged))
    try:
        loaded = load_artifact(folder).manifest
    except ArtifactFormatError:
        return
    assert name == MANIFEST_NAME  # white space of the JSON may change
    assert loaded == before


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest and give it a valid id again, as somebody hostile would."""
    path = folder / MANIFEST_NAME
    content = json.loads(path.read_text())
    change(content)
    with contextlib.suppress(ValueError):
        content["id"] = Manifest.model_validate_json(json.dumps(content)).content_id()
    path.write_text(json.dumps(content))


def set_in(*keys: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: Any) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        set_in("profile", value="kvtc"),
        set_in("profile", value="raw"),
        set_in("groups", 0, "keys", "importance_bias", value=float("nan")),
        set_in("groups", 0, "keys", "importance_bias", value=None),
        set_in("groups", 0, "keys", "plans", 0, "step", value=0.0),
        set_in("groups", 0, "keys", "plans", 0, "step", value=float("inf")),
        set_in("groups", 0, "keys", "plans", 0, "counts", value=[0, 0, 0]),
        set_in("groups", 0, "keys", "plans", 0, "counts", value=[-1, 1, 0, 0]),
        set_in("groups", 0, "keys", "plans", 0, "counts", value=[1 << 19] * 4),
        set_in("groups", 0, "keys", "plans", 0, "plan_id", value=1),
        set_in("groups", 0, "keys", "plans", 0, "plan_id", value=9),
        set_in("groups", 0, "keys", "rank", value=1),
        set_in("ratios", 0, "measured", value=None),
        set_in("ratios", 0, "measured", "kl", value=-0.1),
        set_in("ratios", 0, "measured", "kl", value=float("inf")),
        set_in("ratios", 0, "measured", "top1", value=1.5),
        set_in("ratios", 0, "measured", "ratio", value=0.0),
        set_in("calibration", "sensitivity", value="guessed"),
    ],
)
def test_hostile_manifests_are_refused(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    rewrite(folder, change)
    with pytest.raises(ArtifactFormatError):
        load_artifact(folder)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("metric", lambda metric: -metric, "positive definite"),
        ("metric", lambda metric: metric.triu(), "positive definite"),
        ("metric", torch.zeros_like, "positive definite"),
        ("metric", lambda metric: metric.fill_(torch.nan), "NaN"),
        ("importance", lambda weights: weights.fill_(torch.inf), "NaN or infinity"),
        ("plans.0.rounding", lambda rounding: rounding.fill_(0.75), "roundings"),
        ("plans.0.rounding", torch.zeros_like, "roundings"),
        ("plans.0.offsets", lambda offsets: offsets.fill_(1.0), "offsets"),
        ("plans.0.components", torch.zeros_like, "twice"),
        ("plans.0.components", lambda components: components - components.max() - 1, "below 0"),
        ("plans.0.components", lambda components: components + 1000, "reaches component"),
        ("plans.0.components", lambda components: components.long(), "not those of the manifest"),
    ],
)
def test_hostile_tensors_are_refused(
    tmp_path: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor], says: str
) -> None:
    folder = write(tmp_path, seed=3).folder
    path = folder / PARAMETERS_NAME
    tensors = load_file(path)
    assert tensors["0.keys.plans.0.components"].numel() > 1
    tensors[f"0.keys.{name}"] = change(tensors[f"0.keys.{name}"]).contiguous()
    data = save(tensors)
    path.write_bytes(data)

    def seal(content: dict[str, Any]) -> None:
        content["parameters"] |= {"size": len(data), "blake2b": blake2b(data, digest_size=32).hexdigest()}

    rewrite(folder, seal)
    with pytest.raises(ArtifactFormatError, match=says):
        load_artifact(folder)


def test_the_report_has_its_three_forms(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    artifact = write(tmp_path)
    write_report(artifact)
    summary = json.loads((tmp_path / "report.json").read_text())
    assert (summary["profile"], [entry["ratio"] for entry in summary["ratios"]]) == ("rd", [10.0, 20.0])
    plan = artifact.parameters.groups[1].values.plans[1]
    assert summary["ratios"][1]["plans"][3] == {
        "first_layer": 2,
        "side": "values",
        "step": plan.step,
        "rank": plan.rank,
        "components": dict(zip(("wide", "byte", "nibble", "trit"), plan.counts, strict=True)),
    }
    text = (tmp_path / "report.md").read_text()
    assert "| 20 | 22.00x |" in text and "| 0.0040 | 98.0% |" in text
    assert "| ratio | from layer | side | step | rank | wide | byte | nibble | trit |" in text
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_manifest_without_parts_invented_later_keeps_its_id() -> None:
    """Written by the first version of the schema; the id is what that version computed."""
    side = {
        "rank": 16,
        "total_variance": 2.5,
        "explained_variance": 1.0,
        "plans": [{"plan_id": 0, "bits_per_token": 64, "groups": [[0, 16, "int2"]]}],
    }
    content = {
        "schema_version": 1,
        "id": "6e75611cd4695af2be467c711107320a93227c9c38f3b3ade4a113336b189429",
        "profile": "kvtc",
        "tool_version": "0.1.0",
        "model": {
            "architecture": "LlamaForCausalLM",
            "num_layers": 1,
            "num_kv_heads": 1,
            "head_size": 16,
            "dtype": "bfloat16",
            "rope": {"theta": 1e4, "rotary_dim": 16, "factor": None},
            "weights_hash": "ab" * 32,
        },
        "head_shard": {"first": 0, "count": 1, "total": 1},
        "calibration": {
            "text_digest": "cd" * 32,
            "input_digest": "ef" * 32,
            "documents": 3,
            "document_tokens": 100,
            "rows": 280,
            "sample_rows": 30,
            "sink_tokens": 4,
            "recent_window": 16,
            "method": "eigh",
            "seed": 0,
        },
        "ratios": [{"plan_id": 0, "ratio": 8.0}],
        "groups": [{"first_layer": 0, "num_layers": 1, "keys": side, "values": side}],
        "expected_error": [{"plan_id": 0, "keys": [0.1], "values": [0.2]}],
        "parameters": {
            "name": "parameters.safetensors",
            "size": 4096,
            "blake2b": "12" * 32,
            "basis_dtype": "float16",
        },
    }
    manifest = Manifest.model_validate_json(json.dumps(content))
    assert manifest.content_id() == manifest.id
    assert json.loads(manifest.model_dump_json()) == content
