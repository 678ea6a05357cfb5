"""What the connector is told, checked against what vLLM runs."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVQuantMode, MLAAttentionSpec

from dynamo_kvtc.config import Config, load_config
from dynamo_kvtc.config.units import parse_duration
from dynamo_kvtc.errors import ConfigError, LayoutError
from dynamo_kvtc.pipeline.assemble import offload_policy
from dynamo_kvtc.policy import OffloadPolicy

__all__ = ["ConnectorSettings", "attention_spec", "read_settings"]

#: Keys of kv_connector_extra_config and their defaults; None has to be given.
_KEYS: dict[str, object] = {"config": None, "load": "async", "lookup_timeout": "500ms"}

_LOADS = ("async", "layerwise")

#: Ways to speculate that keep no KV of their own.
_DRAFTERS = ("ngram", "ngram_gpu", "suffix")

#: Hashes that other text can be made to collide with: its KV would be served as this one's.
_WEAK_HASHES = ("xxhash", "xxhash_cbor")


@dataclass(frozen=True, slots=True)
class ConnectorSettings:
    """Settings of both sides of the connector.

    Attributes
    ----------
    layerwise : bool
        Loads are waited for layer by layer inside the step; otherwise the request waits outside of it.
    loads, saves : bool
        What vLLM's kv_role allows.
    block_size : int
        Tokens per block of vLLM.
    service : str
        Name of the lookup service of this engine.
    model : str
        Identity of the model, as far as vLLM's settings tell; part of every key.
    events : bool
        Whether vLLM publishes KV events.
    """

    config: Config
    policy: OffloadPolicy
    layerwise: bool
    loads: bool
    saves: bool
    lookup_timeout_s: float
    block_size: int
    service: str
    model: str
    events: bool


def read_settings(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> ConnectorSettings:
    """Read the connector's settings and refuse what it cannot serve.

    Raises
    ------
    ConfigError
        Naming the setting to change.
    LayoutError
        If the model's cache is of a kind that cannot be encoded.
    """
    transfer = vllm_config.kv_transfer_config
    extra = _known(dict(transfer.kv_connector_extra_config or {}))
    _refuse_parallel(vllm_config)
    _refuse_drafters(vllm_config)
    algorithm = vllm_config.cache_config.prefix_caching_hash_algo
    if algorithm in _WEAK_HASHES:
        raise ConfigError(
            f"--prefix-caching-hash-algo {algorithm} is not collision resistant, "
            "and blocks are found by their hash: use sha256 or sha256_cbor"
        )
    if transfer.kv_load_failure_policy != "recompute":
        raise ConfigError(
            'set "kv_load_failure_policy": "recompute" in --kv-transfer-config (with MultiConnector also in '
            "this connector's own entry): a block that a tier has lost would otherwise fail its request"
        )
    spec = attention_spec(kv_cache_config)
    config = load_config(str(extra["config"]))
    policy = offload_policy(config)
    policy.check_block_size(spec.block_size)
    events = vllm_config.kv_events_config
    return ConnectorSettings(
        config=config,
        policy=policy,
        layerwise=extra["load"] == "layerwise",
        loads=transfer.is_kv_consumer,
        saves=transfer.is_kv_producer,
        lookup_timeout_s=_duration(extra["lookup_timeout"]),
        block_size=spec.block_size,
        service=f"vllm {transfer.engine_id} {vllm_config.parallel_config.data_parallel_rank}",
        model=_model(vllm_config),
        events=events is not None and events.enable_kv_cache_events,
    )


def attention_spec(kv_cache_config: KVCacheConfig) -> FullAttentionSpec:
    """Return the one kind of attention that all layers have.

    Raises
    ------
    LayoutError
        If there are several kinds, or one that cannot be encoded.
    """
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        raise LayoutError(
            f"the model's cache has {len(groups)} groups of layers; hybrid models (sliding window, Mamba, "
            "chunked attention) are not supported. Remove the connector for this model"
        )
    spec = groups[0].kv_cache_spec
    if isinstance(spec, MLAAttentionSpec):
        raise LayoutError("MLA caches are compressed by the model itself and are not supported")
    if type(spec) is not FullAttentionSpec:
        raise LayoutError(f"a cache of kind {type(spec).__name__} is not supported, only full attention")
    if spec.sliding_window is not None or spec.attention_chunk_size is not None:
        raise LayoutError(
            "sliding-window and chunked attention are not supported: vLLM drops their blocks on the way"
        )
    if spec.kv_quant_mode != KVQuantMode.NONE:
        raise LayoutError(
            f"a quantised cache ({spec.kv_quant_mode.name}) cannot be encoded: set --kv-cache-dtype auto"
        )
    if spec.head_size_v != spec.head_size or spec.num_heads != spec.num_kv_heads:
        raise LayoutError("keys and values of different sizes, or packed heads, are not supported")
    return spec


def _model(vllm_config: VllmConfig) -> str:
    model = vllm_config.model_config
    return json.dumps([str(model.model), model.revision, str(model.quantization or "")])


def _known(extra: dict[str, Any]) -> dict[str, Any]:
    for key in extra:
        if key not in _KEYS:
            close = difflib.get_close_matches(key, _KEYS, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; known are {', '.join(_KEYS)}"
            raise ConfigError(f"unknown key {key!r} in kv_connector_extra_config{hint}")
    settings = {**_KEYS, **extra}
    if not settings["config"]:
        raise ConfigError(
            'kv_connector_extra_config needs "config": the path of a dynamo_kvtc configuration file (YAML)'
        )
    if settings["load"] not in _LOADS:
        raise ConfigError(
            f'kv_connector_extra_config: "load" is {" or ".join(_LOADS)}, not {settings["load"]!r}'
        )
    return settings


def _duration(value: object) -> float:
    try:
        seconds = parse_duration(value)
    except ValueError as error:
        raise ConfigError(f"kv_connector_extra_config: lookup_timeout: {error}") from error
    if seconds <= 0:
        raise ConfigError("kv_connector_extra_config: lookup_timeout must be positive")
    return seconds


def _refuse_parallel(vllm_config: VllmConfig) -> None:
    parallel = vllm_config.parallel_config
    for setting in (
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
    ):
        size = getattr(parallel, setting, 1)
        if size != 1:
            flag = "--" + setting.replace("_", "-")
            raise ConfigError(
                f"{flag} {size} is not supported yet: an artifact covers all layers and heads of the model, "
                f"a worker would hold only a part of them. Set {flag} 1"
            )


def _refuse_drafters(vllm_config: VllmConfig) -> None:
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method not in _DRAFTERS:
        raise ConfigError(
            f"speculative decoding with {speculative.method} is not supported: the drafter has KV of its "
            "own, which no artifact covers and which a loaded prefix would lack. Use one of "
            f"{', '.join(_DRAFTERS)} in --speculative-config, or remove it"
        )
