"""Random models of 2 layers, 4 query and 2 KV heads of 8, small enough to differentiate numerically."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import transformers

from dynamo_kvtc.codec.geometry import KvGeometry
from dynamo_kvtc.codec.rope import RopeParameters

TOKEN_IDS = [(7 * i * i + 3 * i) % 97 for i in range(40)]
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # attention far from uniform, so that keys matter
}
FAMILIES = {
    "gemma2": (transformers.Gemma2Config, transformers.Gemma2ForCausalLM),
    "gpt-oss": (transformers.GptOssConfig, transformers.GptOssForCausalLM),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "stablelm": (transformers.StableLmConfig, transformers.StableLmForCausalLM),
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "attention_factor": 1.5,
}


def make_model(kind: str = "llama") -> SimpleNamespace:
    """A model in float64, with the parts of a `LoadedModel` that capture uses.

    `kind` is "llama", "llama yarn", "qwen3", "gemma2", "gpt-oss" (full attention only) or, because
    its norms compute in float64 while those of the others do in float32, "stablelm", "stablelm yarn" or
    "stablelm partial" (half of a head rotated).
    """
    torch.manual_seed(11)
    family, _, variant = kind.partition(" ")
    rope = dict(YARN) if variant == "yarn" else {"rope_type": "default", "rope_theta": 1e4}
    if family == "stablelm":
        rope["partial_rotary_factor"] = 0.5 if variant == "partial" else 1.0
    config_class, model_class = FAMILIES[family]
    extra = {"layer_types": ["full_attention"] * 2} if family == "gpt-oss" else {}
    config = config_class(**SHAPE, head_dim=8, rope_parameters=rope, **extra)
    geometry = KvGeometry(num_layers=2, num_kv_heads=2, head_size=8, dtype="float32")
    return SimpleNamespace(
        model=model_class(config).eval().double(),
        geometry=geometry,
        rope=RopeParameters.from_hf_config(config),
    )
