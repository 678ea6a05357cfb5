"""Shapes of models whose KV the GPU codec is measured with, and what recomputing it takes."""

from __future__ import annotations

from dataclasses import dataclass

from dynamo_kvtc.codec.geometry import KvGeometry
from dynamo_kvtc.codec.rope import RopeParameters
from dynamo_kvtc.errors import EvaluationError
from dynamo_kvtc.planning.models import KNOWN_MODELS

__all__ = ["SHAPES", "BenchShape", "find_shapes"]


@dataclass(frozen=True, slots=True)
class BenchShape:
    """A model's KV cache on one GPU.

    Attributes
    ----------
    name : str
        What tables call it.
    geometry : KvGeometry
        Layers, KV heads and head size of this rank.
    rope : RopeParameters
        How keys are rotated.
    token_operations : float
        Operations of one token's matrix products on this rank, the vocabulary's left out: twice the weights.
    query_heads : int
        Heads of this rank that attend.
    """

    name: str
    geometry: KvGeometry
    rope: RopeParameters
    token_operations: float
    query_heads: int

    @property
    def raw_bytes(self) -> int:
        """Bytes of one token's KV at 16 bits."""
        return self.geometry.token_bytes_16bit

    def prefill_operations(self, tokens: int) -> float:
        """Return the operations of computing the KV of a sequence: weights, and causal attention.

        Attention makes two products of ``tokens**2 / 2 * head_size`` multiplications and additions in each
        head of each layer.
        """
        attention = 2 * self.geometry.num_layers * self.query_heads * self.geometry.head_size * tokens**2
        return self.token_operations * tokens + attention


def _shape(name: str, model: str, rope: RopeParameters, ranks: int = 1) -> BenchShape:
    config = KNOWN_MODELS[model]
    layers, hidden, head = config["num_hidden_layers"], config["hidden_size"], config["head_dim"]
    queries, kv = config["num_attention_heads"], config["num_key_value_heads"]
    weights = layers * (2 * hidden * (queries + kv) * head + 3 * hidden * config["intermediate_size"])
    geometry = KvGeometry(layers, kv // ranks, head, "bfloat16")
    return BenchShape(name, geometry, rope, 2.0 * weights / ranks, queries // ranks)


_LLAMA3 = RopeParameters(
    theta=500_000.0,
    rotary_dim=128,
    scaling="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
_PLAIN = RopeParameters(theta=1_000_000.0, rotary_dim=128)

#: What ``dynamo-kvtc bench gpu`` measures by default. A rank of eight holds one KV head of each layer.
SHAPES: tuple[BenchShape, ...] = (
    _shape("Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct", _LLAMA3),
    _shape("Mistral-NeMo-12B", "mistralai/Mistral-Nemo-Instruct-2407", _PLAIN),
    _shape("Qwen3-32B", "Qwen/Qwen3-32B", _PLAIN),
    _shape("Llama-3.3-70B, TP8 rank", "meta-llama/Llama-3.3-70B-Instruct", _LLAMA3, ranks=8),
)


def find_shapes(names: str | None) -> tuple[BenchShape, ...]:
    """Return the shapes whose names begin with one of some, separated by commas; all of them if None.

    Raises
    ------
    EvaluationError
        If a name fits none.
    """
    if names is None:
        return SHAPES
    found = []
    for name in names.split(","):
        fitting = [shape for shape in SHAPES if shape.name.lower().startswith(name.strip().lower())]
        if not fitting or not name.strip():
            known = ", ".join(shape.name.split(",")[0] for shape in SHAPES)
            raise EvaluationError(f"no shape {name.strip()!r}; known: {known}")
        found += fitting
    return tuple(dict.fromkeys(found))
