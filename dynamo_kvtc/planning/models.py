"""Shapes of models: of a few by name, of any other from its ``config.json``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dynamo_kvtc.calibration.models import cache_geometry
from dynamo_kvtc.codec.geometry import KvGeometry
from dynamo_kvtc.errors import ConfigError, KvtcError

__all__ = ["KNOWN_MODELS", "ModelShape", "read_model"]

_CONFIG_BYTES = 4 << 20


def _shape(
    layers: int, hidden: int, heads: int, kv_heads: int, head: int, inner: int, vocabulary: int, context: int
) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "max_position_embeddings": context,
        "tie_word_embeddings": False,
    }


#: Shapes from the models' own ``config.json``, by their names on the Hugging Face hub.
KNOWN_MODELS: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-3.1-8B-Instruct": _shape(32, 4096, 32, 8, 128, 14336, 128_256, 131_072),
    "meta-llama/Llama-3.3-70B-Instruct": _shape(80, 8192, 64, 8, 128, 28672, 128_256, 131_072),
    "mistralai/Mistral-Nemo-Instruct-2407": _shape(40, 5120, 32, 8, 128, 14336, 131_072, 131_072),
    "Qwen/Qwen3-8B": _shape(36, 4096, 32, 8, 128, 12288, 151_936, 40_960),
    "Qwen/Qwen3-32B": _shape(64, 5120, 64, 8, 128, 25600, 151_936, 40_960),
    "HuggingFaceTB/SmolLM2-135M-Instruct": {
        **_shape(30, 576, 9, 3, 64, 1536, 49_152, 8192),
        "tie_word_embeddings": True,
    },
}


@dataclass(frozen=True)
class ModelShape:
    """What sizing needs to know about a model.

    Attributes
    ----------
    name : str
        What an engine's ``--model`` gets.
    geometry : KvGeometry
        Shape and dtype of its KV cache.
    weights : int
        Parameters, estimated from the shape: dense decoders to about a per cent.
    context : int
        Longest sequence in tokens.
    """

    name: str
    geometry: KvGeometry
    weights: int
    context: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights at 16 bits."""
        return 2 * self.weights


def read_model(spec: str, dtype: str = "bfloat16") -> ModelShape:
    """Return the shape of a model.

    Parameters
    ----------
    spec : str
        A name in `KNOWN_MODELS` (its part after the slash is enough, in any case), a ``config.json``, or
        a folder that holds one.
    dtype : str
        dtype of the KV cache.

    Raises
    ------
    ConfigError
        If there is no such model, its configuration is unreadable, or its KV cache is not one row of plain
        keys and values per token.
    LayoutError
        If the dtype is unknown.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        return _from_config(_read_json(path), str(path.parent), dtype)
    for name, config in KNOWN_MODELS.items():
        if spec.lower() in (name.lower(), name.split("/")[1].lower()):
            return _from_config(config, name, dtype)
    short = {name.split("/")[1].lower(): name for name in KNOWN_MODELS}
    close = get_close_matches(spec.split("/")[-1].lower(), short, n=1, cutoff=0.5)
    hint = f"; did you mean {short[close[0]]}?" if close else ""
    raise ConfigError(
        f"no model {spec!r}: give the path of its config.json, or one of {', '.join(KNOWN_MODELS)}{hint}"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            config = json.loads(file.read(_CONFIG_BYTES))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}; copy the model's config.json anew") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} is no model configuration: it holds a {type(config).__name__}")
    return config


class _JsonConfig(SimpleNamespace):
    """A ``config.json`` with the face of a transformers configuration, as far as shapes need it."""

    def get_text_config(self) -> _JsonConfig:
        """Return the language model's part of a multimodal configuration, or the whole."""
        inner = getattr(self, "text_config", None)
        return _JsonConfig(**inner) if isinstance(inner, dict) else self


def _from_config(config: dict[str, Any], name: str, dtype: str) -> ModelShape:
    whole = _JsonConfig(**config)
    text = whole.get_text_config()
    try:
        geometry = cache_geometry(whole, dtype)
        return ModelShape(name, geometry, _count_weights(text, geometry), int(text.max_position_embeddings))
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"the configuration of {name} lacks what its shape follows from: {error}"
        ) from error
    except KvtcError as error:
        raise ConfigError(f"{name} cannot be planned for: {error}") from error


def _count_weights(text: Any, geometry: KvGeometry) -> int:
    """Count the parameters of a decoder with gated feed-forward layers; norms and biases are left out."""
    hidden = int(text.hidden_size)
    queries = int(text.num_attention_heads) * geometry.head_size
    attention = 2 * hidden * queries + 2 * hidden * geometry.layer_size
    experts = int(getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None) or 1)
    inner = int((experts > 1 and getattr(text, "moe_intermediate_size", None)) or text.intermediate_size)
    embeddings = 1 if getattr(text, "tie_word_embeddings", False) else 2
    return (
        geometry.num_layers * (attention + experts * 3 * hidden * inner)
        + embeddings * int(text.vocab_size) * hidden
    )
