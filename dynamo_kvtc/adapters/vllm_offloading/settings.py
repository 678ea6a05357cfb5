"""What the tier is told, and what it learns about vLLM's cache; refuses what it cannot be sure of."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Any

from vllm.platforms import current_platform
from vllm.transformers_utils.config import get_config
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_offload.base import OffloadingSpec

from dynamo_kvtc.adapters.vllm.layouts import SPLIT_BACKENDS, cpu_writer, discover_places
from dynamo_kvtc.codec.geometry import KvGeometry
from dynamo_kvtc.codec.rope import RopeParameters
from dynamo_kvtc.config import Config, load_config
from dynamo_kvtc.errors import ConfigError, LayoutError
from dynamo_kvtc.pipeline.row_cache import Places, chunk_places, split_places

__all__ = ["ModelCache", "check_layout", "model_cache", "page_places", "read_config", "refuse_unknown"]

#: The layout that vLLM's OffloadingConnector asks for: per layer, block, head, token, keys and values.
_KNOWN_LAYOUT = "LBHNC"


@dataclass(frozen=True, slots=True)
class ModelCache:
    """What vLLM's cache of this model is like.

    Attributes
    ----------
    block_size : int
        Tokens of a block of the engine.
    blocks_per_chunk : int
        Blocks of the engine in a chunk.
    layer_order : tuple[int, ...]
        Which layer of the model each run of a row's pages belongs to.
    rope : RopeParameters or None
        How the model rotates keys; None where nobody needs to know.
    salt : bytes
        Keeps the objects of different models apart that would otherwise look alike.
    """

    geometry: KvGeometry
    block_size: int
    blocks_per_chunk: int
    layer_order: tuple[int, ...]
    rope: RopeParameters | None
    salt: bytes

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a chunk."""
        return self.block_size * self.blocks_per_chunk


def refuse_unknown(unknown: dict[str, Any], known: tuple[str, ...]) -> None:
    """Raise `ConfigError` about the first key that is not known."""
    for key in unknown:
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"
        raise ConfigError(f"unknown key {key!r} for the compressed tier{hint}")


def read_config(path: object, chunk_tokens: int) -> Config:
    """Load the configuration file and fit it to chunks of vLLM.

    A chunk is one tier block, whatever ``policy.tier_block_tokens`` says. Raw objects lose nothing, so the
    recent window does not count for them.

    Raises
    ------
    ConfigError
        If there is no such file, or its settings do not fit.
    """
    if not isinstance(path, str) or not path:
        raise ConfigError('the tier needs "config": the path of a dynamo_kvtc configuration file (YAML)')
    config = load_config(path)
    if config.policy.sink_tokens > chunk_tokens:
        raise ConfigError(
            f"policy.sink_tokens ({config.policy.sink_tokens}) must fit into one chunk of vLLM "
            f'({chunk_tokens} tokens): set "block_size" in kv_connector_extra_config to 256, for example'
        )
    changes: dict[str, Any] = {"tier_block_tokens": chunk_tokens}
    if config.codec.profile == "raw":
        changes |= {"recent_window": 0, "minimum_tokens": 0}
    return config.model_copy(update={"policy": config.policy.model_copy(update=changes)})


def check_layout(spec: OffloadingSpec) -> None:
    """Refuse caches whose rows are not one worker's full-attention pages in a known order.

    Raises
    ------
    ConfigError, LayoutError
        Naming what to change.
    """
    config = spec.config
    if config.parallel.world_size != 1:
        raise ConfigError(
            f"the compressed tier does not support a world size of {config.parallel.world_size} yet: an "
            "artifact covers all layers and heads, a worker holds a part of them. Use one worker per engine"
        )
    if len(config.groups) != 1:
        raise LayoutError(
            f"the model's cache has {len(config.groups)} groups of layers; hybrid models (sliding window, "
            "Mamba, chunked attention) are not supported. Remove the tier for this model"
        )
    if config.canonical_layout:
        raise ConfigError("canonical_layout is not supported by the compressed tier: remove it")
    if config.kv_cache_layout not in (None, _KNOWN_LAYOUT):
        raise LayoutError(
            f"the cache layout {config.kv_cache_layout} is not known: unset VLLM_KV_CACHE_LAYOUT, so that "
            f"the connector chooses {_KNOWN_LAYOUT}"
        )
    if config.cache.tokens_per_hash != config.groups[0].tokens_per_block:
        raise LayoutError("blocks that differ from the unit of block hashes are not supported")


def model_cache(spec: OffloadingSpec, *, needs_rope: bool) -> ModelCache:
    """Learn what the cache is like from vLLM's settings and the model's own configuration.

    Raises
    ------
    LayoutError
        If the two do not agree, or the model's attention is of a kind that cannot be encoded.
    RopeError
        If keys are rotated in a way that cannot be undone.
    """
    config = spec.config
    group = config.groups[0]
    hf = get_config(config.model.name, trust_remote_code=False).get_text_config()
    if getattr(hf, "kv_lora_rank", None):
        raise LayoutError("MLA caches are compressed by the model itself and are not supported")
    if getattr(hf, "sliding_window", None) and getattr(hf, "use_sliding_window", True):
        raise LayoutError("sliding-window attention is not supported: vLLM drops its blocks on the way")
    heads = int(getattr(hf, "num_key_value_heads", None) or hf.num_attention_heads)
    head_size = int(getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads)
    geometry = KvGeometry(len(group.layer_names), heads, head_size, config.model.dtype)
    expected = geometry.token_bytes * group.tokens_per_block
    if config.worker_kv_bytes_per_block != expected:
        raise LayoutError(
            f"a block of vLLM's cache has {config.worker_kv_bytes_per_block} bytes, one of {geometry} would "
            f"have {expected}: padded or packed pages are not supported"
        )
    identity = (config.model.name, str(getattr(hf, "_commit_hash", None) or ""))
    return ModelCache(
        geometry=geometry,
        block_size=group.tokens_per_block,
        blocks_per_chunk=config.cache.blocks_per_chunk,
        layer_order=_layer_order(group.layer_names),
        rope=RopeParameters.from_hf_config(hf) if needs_rope else None,
        salt=b"vllm-offloading" + b"".join(b"%d:%s" % (len(part), part.encode()) for part in identity),
    )


def page_places(cache: ModelCache, backend: str | None, *, blocks: int) -> Places:
    """Return the places of a run of pages.

    Parameters
    ----------
    backend : str or None
        vLLM's attention backend, where vLLM does not say: on every platform but the CPU.
    blocks : int
        Pages that follow one another.

    Returns
    -------
    Places
        int64 ``[tokens, heads, head_size]`` for keys and values: where in the run each element lies.

    Raises
    ------
    ConfigError
        If the backend is needed and not known.
    """
    geometry = cache.geometry
    shape = (cache.block_size, geometry.num_kv_heads, geometry.head_size)
    if current_platform.is_cpu():
        spec = FullAttentionSpec(
            block_size=cache.block_size,
            num_kv_heads=geometry.num_kv_heads,
            head_size=geometry.head_size,
            dtype=geometry.torch_dtype,
        )
        places = discover_places(*shape, geometry.torch_dtype, cpu_writer(spec))
    elif backend in SPLIT_BACKENDS:
        places = split_places(*shape)
    else:
        raise ConfigError(
            "how a page is laid out depends on vLLM's attention backend, of which a tier is not told: set "
            f'"attention_backend" to the one in use ({", ".join(SPLIT_BACKENDS)} are known), and '
            "--attention-backend to the same"
        )
    return chunk_places(places, blocks)


def _layer_order(names: tuple[str, ...]) -> tuple[int, ...]:
    """Rank layers by the number in their name."""
    numbers = []
    for name in names:
        found = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name)
        if len(found) != 1:
            raise LayoutError(f"the name of layer {name} does not hold one number")
        numbers.append(int(found[0]))
    if len(set(numbers)) < len(numbers):
        raise LayoutError("several attention layers share a number; not supported")
    rank = {number: index for index, number in enumerate(sorted(numbers))}
    return tuple(rank[number] for number in numbers)
