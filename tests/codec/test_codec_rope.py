"""RoPE against transformers' own implementation, and its inverse against itself."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_kvtc.codec.rope import RopeParameters
from dynamo_kvtc.errors import RopeError

LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
}
LLAMA31_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
QWEN25 = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}

#: Published configurations, as their config.json spells them, and variants of each scaling's options.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama-2": {**LLAMA, "rope_theta": 10000.0, "max_position_embeddings": 4096},
    "llama-3.1-8b": {**LLAMA, "rope_scaling": LLAMA31_SCALING},
    "llama-3.2-1b": {
        **LLAMA,
        "hidden_size": 2048,
        "head_dim": 64,
        "rope_scaling": {**LLAMA31_SCALING, "factor": 32.0},
    },
    "linear": {**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.5}},
    "qwen2.5-7b": QWEN25,
    "qwen2.5-7b-yarn": {**QWEN25, "rope_scaling": YARN},
    "yarn-attention-factor": {**QWEN25, "rope_scaling": {**YARN, "attention_factor": 1.7}},
    "yarn-betas": {**QWEN25, "rope_scaling": {**YARN, "beta_fast": 16.0, "beta_slow": 2.0}},
    "yarn-mscale": {**QWEN25, "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 1.0}},
    "yarn-no-truncate": {**QWEN25, "rope_scaling": {**YARN, "truncate": False}},
    "yarn-v5": {
        **{key: value for key, value in QWEN25.items() if key != "rope_theta"},
        "rope_parameters": {"rope_theta": 150000.0, "rope_type": "yarn", "factor": 32.0,
                            "original_max_position_embeddings": 4096, "truncate": False},
    },
}  # fmt: skip


def hf_rotary(config: dict[str, Any]) -> Any:
    """transformers' rotary embedding module for a config; Llama's serves all half-style models."""
    pytest.importorskip("transformers")
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    settings = {key: value for key, value in config.items() if key != "model_type"}
    return LlamaRotaryEmbedding(LlamaConfig(**json.loads(json.dumps(settings))))


@pytest.mark.parametrize("name", CONFIGS)
def test_frequencies_and_attention_scaling_are_those_of_transformers(name):
    rope = RopeParameters.from_hf_config(CONFIGS[name])
    rotary = hf_rotary(CONFIGS[name])
    torch.testing.assert_close(rope.inv_freq().float(), rotary.inv_freq, rtol=2e-6, atol=0)
    assert rope.attention_scaling() == pytest.approx(rotary.attention_scaling, rel=1e-12)


@pytest.mark.parametrize("name", CONFIGS)
def test_rotated_keys_are_those_of_transformers(name):
    rotary = hf_rotary(CONFIGS[name])
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    rope = RopeParameters.from_hf_config(CONFIGS[name])
    keys = torch.randn(40, 3, rope.rotary_dim, generator=torch.Generator().manual_seed(1))
    positions = torch.arange(1000, 1040)
    cos, sin = rotary(keys, positions[None])
    expected = apply_rotary_pos_emb(keys.transpose(0, 1)[None], keys.transpose(0, 1)[None], cos, sin)[1]
    # transformers computes angles in float32, which costs position * 2**-24 radians.
    torch.testing.assert_close(
        rope.apply_rope(keys, positions), expected[0].transpose(0, 1), rtol=0, atol=2e-3
    )


def test_a_configuration_object_reads_like_its_json():
    pytest.importorskip("transformers")
    from transformers import LlamaConfig, Qwen2Config

    for name, cls in (("llama-3.1-8b", LlamaConfig), ("qwen2.5-7b-yarn", Qwen2Config)):
        settings = {key: value for key, value in CONFIGS[name].items() if key != "model_type"}
        config = cls(**json.loads(json.dumps(settings)))
        assert RopeParameters.from_hf_config(config) == RopeParameters.from_hf_config(CONFIGS[name])


@pytest.mark.parametrize(("module", "config"), [("glm", "GlmConfig"), ("cohere", "CohereConfig")])
def test_interleaved_models_are_rotated_as_transformers_does(module, config):
    pytest.importorskip("transformers")
    from importlib import import_module

    import transformers

    modeling = import_module(f"transformers.models.{module}.modeling_{module}")
    hf_config = getattr(transformers, config)(hidden_size=256, num_attention_heads=4, head_dim=64)
    rotary = getattr(modeling, f"{module.capitalize()}RotaryEmbedding")(hf_config)
    rope = RopeParameters.from_hf_config(hf_config)
    assert rope.style == "interleaved"
    keys = torch.randn(20, 2, 64, generator=torch.Generator().manual_seed(2))
    positions = torch.arange(20)
    heads_first = keys.transpose(0, 1)[None]
    cos, sin = rotary(keys, positions[None])
    expected = modeling.apply_rotary_pos_emb(heads_first, heads_first, cos, sin)[1]
    torch.testing.assert_close(
        rope.apply_rope(keys, positions), expected[0].transpose(0, 1), rtol=0, atol=1e-5
    )


ROPES = st.builds(
    RopeParameters,
    theta=st.floats(100, 1e7),
    rotary_dim=st.integers(1, 16).map(lambda n: 2 * n),
    style=st.sampled_from(["half", "interleaved"]),
    scaling=st.sampled_from(["default", "linear", "llama3", "yarn"]),
    factor=st.floats(1, 40),
    original_max_position_embeddings=st.sampled_from([2048, 32768]),
    attention_factor=st.none() | st.floats(0.5, 2),
)


@settings(deadline=None, max_examples=60)
@given(rope=ROPES, extra=st.integers(0, 5), first=st.integers(0, 1 << 20), layers=st.integers(0, 2))
def test_removing_undoes_applying(rope, extra, first, layers):
    shape = (5, *([3] * layers), 2, rope.rotary_dim + extra)
    keys = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    positions = torch.arange(first, first + 5)
    rotated = rope.apply_rope(keys, positions)
    torch.testing.assert_close(rope.remove_rope(rotated, positions), keys, rtol=0, atol=1e-5)
    assert torch.equal(rotated[..., rope.rotary_dim :], keys[..., rope.rotary_dim :])


@settings(deadline=None, max_examples=30)
@given(rope=ROPES)
def test_json_round_trip(rope):
    assert RopeParameters.from_dict(json.loads(json.dumps(rope.to_dict()))) == rope


def test_rotation_keeps_float32_and_leaves_its_input_alone():
    rope = RopeParameters(theta=10_000.0, rotary_dim=8)
    keys = torch.randn(4, 2, 8).to(torch.bfloat16)
    before = keys.clone()
    assert rope.apply_rope(keys, torch.arange(4)).dtype is torch.float32
    assert torch.equal(keys, before)


def test_partial_rotary_is_read():
    config = {**QWEN25, "model_type": "phi3", "partial_rotary_factor": 0.5}
    assert RopeParameters.from_hf_config(config).rotary_dim == 64
    neox = {"model_type": "gpt_neox", "hidden_size": 512, "num_attention_heads": 8, "rotary_pct": 0.25,
            "rotary_emb_base": 10000, "max_position_embeddings": 2048}  # fmt: skip
    assert RopeParameters.from_hf_config(neox).rotary_dim == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
            "longrope",
        ),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, "multimodal"),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 24]}}, "multimodal"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "layer types differently"),
        ({"rope_local_base_freq": 10000.0}, "layer types differently"),
        ({"no_rope_layers": [1, 1, 1, 0]}, "unrotated"),
        ({"model_type": "cohere2"}, "unrotated"),
        ({"rope_theta": None}, "no rope_theta"),
    ],
)
def test_what_cannot_be_removed_is_refused(change, message):
    with pytest.raises(RopeError, match=message):
        RopeParameters.from_hf_config({**LLAMA, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"theta": 1.0},
        {"theta": float("nan")},
        {"rotary_dim": 7},
        {"rotary_dim": 0},
        {"style": "diagonal"},
        {"scaling": "ntk"},
        {"scaling": "yarn"},
        {"scaling": "llama3", "original_max_position_embeddings": 8192, "low_freq_factor": 4.0},
        {"factor": 0.0},
        {"attention_factor": 0.0},
        {"unknown": 1},
        {"theta": "big"},
    ],
)
def test_bad_parameters_are_refused(change):
    with pytest.raises(RopeError):
        RopeParameters.from_dict({"theta": 10_000.0, "rotary_dim": 64, **change})
    with pytest.raises(RopeError, match="incomplete"):
        RopeParameters.from_dict({"theta": 10_000.0})


def test_misfitting_keys_are_refused():
    rope = RopeParameters(theta=10_000.0, rotary_dim=8)
    with pytest.raises(RopeError, match="do not fit"):
        rope.apply_rope(torch.zeros(3, 1, 8), torch.arange(4))
    with pytest.raises(RopeError, match="cannot have 8"):
        rope.apply_rope(torch.zeros(4, 1, 6), torch.arange(4))
