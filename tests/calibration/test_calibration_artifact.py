from __future__ import annotations

import contextlib
import dataclasses
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynamo_kvtc.calibration.artifact import load_artifact
from dynamo_kvtc.calibration.artifact_writer import FittedSide, write_artifact
from dynamo_kvtc.calibration.fingerprint import ModelFingerprint
from dynamo_kvtc.calibration.manifest import CalibrationRecord, Manifest
from dynamo_kvtc.codec.geometry import KvGeometry, LayerRange
from dynamo_kvtc.codec.plan import BitPlan, PlanGroup, QuantType
from dynamo_kvtc.codec.rope import RopeParameters
from dynamo_kvtc.errors import ArtifactFormatError, ArtifactMismatchError

GEOMETRY = KvGeometry(num_layers=3, num_kv_heads=1, head_size=16)
ROPE = RopeParameters(theta=10_000.0, rotary_dim=16)
GROUPS = (LayerRange(0, 2), LayerRange(2, 1))
PLANS = {
    0: BitPlan((PlanGroup(0, 1, QuantType.FP8), PlanGroup(1, 16, QuantType.INT4))),
    1: BitPlan((PlanGroup(0, 16, QuantType.INT2),)),
}


def fitted(layers: int, seed: int) -> FittedSide:
    generator = torch.Generator().manual_seed(seed)
    row = layers * GEOMETRY.layer_size
    rank = min(17, row)
    plans = PLANS if rank == 17 else dict.fromkeys(PLANS, PLANS[1])
    basis = torch.linalg.qr(torch.randn(row, row, generator=generator)).Q[:rank]
    return FittedSide(
        mean=torch.randn(row, generator=generator),
        basis=basis.half(),
        variances=torch.linspace(9, 1, rank),
        total_variance=100.0,
        plans=plans,
        errors=dict.fromkeys(plans, (0.1,) * layers),
    )


def write(folder, seed: int = 0):
    return write_artifact(
        folder,
        fingerprint=ModelFingerprint("LlamaForCausalLM", GEOMETRY, ROPE, "ab" * 32),
        layer_groups=GROUPS,
        sides=[
            (fitted(layers.count, seed + 2 * i), fitted(layers.count, seed + 2 * i + 1))
            for i, layers in enumerate(GROUPS)
        ],
        ratios={0: 4.0, 1: 8.0},
        calibration=CalibrationRecord(
            text_digest="cd" * 32,
            input_digest="ef" * 32,
            documents=3,
            document_tokens=100,
            rows=280,
            sample_rows=30,
            sink_tokens=4,
            recent_window=16,
            method="eigh",
            seed=0,
        ),
    )


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "artifact")
    return tmp_path / "artifact"


def test_what_is_written_is_read_back(folder):
    parameters = load_artifact(folder).parameters
    assert parameters.geometry == GEOMETRY
    assert parameters.rope == ROPE
    assert parameters.ratios == {0: 4.0, 1: 8.0}
    assert [group.layers for group in parameters.groups] == list(GROUPS)
    expected = fitted(2, 1)
    values = parameters.groups[0].values
    assert torch.equal(values.mean, expected.mean)
    assert torch.equal(values.basis, expected.basis.float())
    assert values.plans == expected.plans


def test_the_id_is_a_hash_of_the_content(tmp_path):
    first, again, other = write(tmp_path / "a"), write(tmp_path / "b"), write(tmp_path / "c", seed=9)
    assert first.parameters.artifact_id == again.parameters.artifact_id == bytes.fromhex(first.manifest.id)
    assert first.parameters.artifact_id != other.parameters.artifact_id
    assert (tmp_path / "a/artifact.json").read_bytes() == (tmp_path / "b/artifact.json").read_bytes()


def test_an_artifact_can_be_replaced_and_nothing_else_is_left(folder):
    write(folder, seed=9)
    assert load_artifact(folder).parameters.groups[0].keys.mean[0] == fitted(2, 9).mean[0]
    assert sorted(path.name for path in folder.iterdir()) == ["artifact.json", "parameters.safetensors"]


@pytest.mark.parametrize("name", ["artifact.json", "parameters.safetensors"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_flipped_bit_is_found_or_harmless(folder, name, data):
    path = folder / name
    original = path.read_bytes()
    before = load_artifact(folder).manifest
    position = data.draw(st.integers(0, len(original) - 1))
    damaged = bytearray(original)
    damaged[position] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(bytes(damaged))
    try:
        loaded = load_artifact(folder).manifest
    except ArtifactFormatError:
        pass
    else:  # white space of the JSON may change
        assert name == "artifact.json"
        assert loaded == before
    finally:
        path.write_bytes(original)


@pytest.mark.parametrize("name", ["artifact.json", "parameters.safetensors"])
@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_truncated_files_are_refused(folder, name, keep):
    path = folder / name
    path.write_bytes(path.read_bytes().rstrip()[:keep])
    with pytest.raises(ArtifactFormatError, match=name):
        load_artifact(folder)


def test_longer_tensors_are_refused(folder):
    with (folder / "parameters.safetensors").open("ab") as file:
        file.write(bytes(8))
    with pytest.raises(ArtifactFormatError, match="damaged"):
        load_artifact(folder)


def test_missing_parts_say_what_to_do(folder, tmp_path):
    with pytest.raises(ArtifactFormatError, match="dynamo-kvtc calibrate"):
        load_artifact(tmp_path / "nowhere")
    (folder / "parameters.safetensors").unlink()
    with pytest.raises(ArtifactFormatError, match="copy the artifact anew"):
        load_artifact(folder)
    with pytest.raises(ArtifactFormatError, match="cannot read"):
        load_artifact(folder / "artifact.json")


def rewrite(folder, change) -> None:
    """Change the manifest and give it a valid id again, as somebody hostile would."""
    path = folder / "artifact.json"
    content = json.loads(path.read_text())
    change(content)
    with contextlib.suppress(ValueError):
        content["id"] = Manifest.model_validate_json(json.dumps(content)).content_id()
    path.write_text(json.dumps(content))


def set_in(*keys, value):
    def change(content) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        set_in("schema_version", value=2),
        set_in("unknown", value=1),
        set_in("model", "num_layers", value="3"),
        set_in("model", "num_layers", value=4),
        set_in("model", "num_kv_heads", value=2),
        set_in("model", "head_size", value=4096),
        set_in("model", "num_layers", value=10**9),
        set_in("model", "rope", value={"theta": 1e4}),
        set_in("model", "rope", value={"theta": 1e4, "rotary_dim": 16, "surprise": 1}),
        set_in("head_shard", "count", value=2),
        set_in("groups", 0, "first_layer", value=1),
        set_in("groups", 0, "keys", "rank", value=1_000_000),
        set_in("groups", 0, "keys", "plans", 0, "groups", value=[[0, 7, "int2"]]),
        set_in("groups", 0, "keys", "plans", 0, "groups", value=[[16, 16, "int2"]]),
        set_in("groups", 0, "keys", "plans", 0, "groups", value=[[0, 16, "int3"]]),
        set_in("groups", 0, "keys", "plans", 0, "plan_id", value=5),
        set_in("groups", 0, "keys", "total_variance", value=float("inf")),
        set_in("ratios", 0, "ratio", value=0.5),
        set_in("expected_error", 0, "keys", value=[0.1]),
        set_in("parameters", "size", value=1 << 60),
        set_in("parameters", "basis_dtype", value="float32"),
        set_in("parameters", "name", value="../other.safetensors"),
    ],
)
def test_hostile_manifests_are_refused(folder, change):
    rewrite(folder, change)
    with pytest.raises(ArtifactFormatError):
        load_artifact(folder)


def test_a_changed_manifest_fails_its_id(folder):
    path = folder / "artifact.json"
    path.write_text(path.read_text().replace('"architecture": "Llama', '"architecture": "Other'))
    with pytest.raises(ArtifactFormatError, match="content id"):
        load_artifact(folder)


def test_the_right_model_passes(folder):
    artifact = load_artifact(folder)
    artifact.check_model(GEOMETRY, ROPE, "ab" * 32)
    artifact.check_model(GEOMETRY, ROPE)
    fingerprint = artifact.fingerprint
    assert (fingerprint.architecture, fingerprint.weights_hash) == ("LlamaForCausalLM", "ab" * 32)


@pytest.mark.parametrize(
    ("geometry", "rope", "weights", "named"),
    [
        ({"num_layers": 4}, {}, None, "num layers 4 instead of 3"),
        ({"num_kv_heads": 2}, {}, None, "num kv heads 2"),
        ({"dtype": "float16"}, {}, None, "dtype float16"),
        ({}, {"theta": 5e5}, None, "RoPE"),
        ({}, {}, "00" * 32, "other weights"),
    ],
)
def test_another_model_is_refused_by_name(folder, geometry, rope, weights, named):
    artifact = load_artifact(folder)
    with pytest.raises(ArtifactMismatchError, match=named):
        artifact.check_model(
            dataclasses.replace(GEOMETRY, **geometry), dataclasses.replace(ROPE, **rope), weights
        )
