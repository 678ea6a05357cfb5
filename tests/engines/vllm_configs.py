"""vLLM's own configuration objects for tests, made as its command line makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from offloading_host import write_model
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

TOKENS, HEADS, SIZE = 32, 3, 64
LAYER = "model.layers.{}.self_attn.attn"


def spec(dtype: torch.dtype = torch.float32, **changes: Any) -> FullAttentionSpec:
    fields = {"block_size": TOKENS, "num_kv_heads": HEADS, "head_size": SIZE, "dtype": dtype, **changes}
    return FullAttentionSpec(**fields)


def cache_config(*specs: Any, blocks: int = 4) -> KVCacheConfig:
    groups = [KVCacheGroupSpec([LAYER.format(index)], one) for index, one in enumerate(specs or [spec()])]
    return KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=groups)


def engine_config(
    tmp_path: Path,
    settings_file: Path,
    extra: dict[str, Any] | None = None,
    engine: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    transfer = {
        "kv_connector": "KvtcConnector",
        "kv_connector_module_path": "dynamo_kvtc.adapters.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"config": str(settings_file)} if extra is None else extra,
    }
    transfer.update(options)
    arguments = EngineArgs(
        model=str(write_model(tmp_path / "model")),
        skip_tokenizer_init=True,
        enforce_eager=True,
        block_size=TOKENS,
        kv_transfer_config=KVTransferConfig(**transfer),
        **(engine or {}),
    )
    return arguments.create_engine_config()
