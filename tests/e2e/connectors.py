"""What goes into ``--kv-transfer-config``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.local_dynamo.processes import wait_until

Connector = dict[str, Any]

#: Tokens of a tier block, in all configurations here.
TIER_BLOCK = 256

#: Elements per token of SmolLM2-135M: layers, keys and values, heads, channels.
ELEMENTS_PER_TOKEN = 30 * 2 * 3 * 64


def example(folder: Path) -> Connector:
    """Return vLLM's own example, which keeps plain files."""
    return {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(folder)},
    }


def nixl(role: str) -> Connector:
    """Return the connector between prefill (``kv_producer``) and decode (``kv_consumer``)."""
    return {"kv_connector": "NixlConnector", "kv_role": role, "kv_buffer_device": "cpu"}


def multi(role: str, *connectors: Connector) -> Connector:
    """Return several connectors in one."""
    return {
        "kv_connector": "MultiConnector",
        "kv_role": role,
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"connectors": list(connectors)},
    }


def write_config(path: Path, tier: Path, **changes: Any) -> Path:
    """Write a configuration with one disk tier that keeps everything, in the cache's exact bytes."""
    config = {
        "codec": {"profile": "raw"},
        "tiers": [{"kind": "disk", "path": str(tier), "capacity": "2GiB"}],
        # Whole tier blocks, from the first request on.
        "policy": {
            "tier_block_tokens": TIER_BLOCK,
            "recent_window": 0,
            "minimum_tokens": 0,
            # Tokens are counted here, whatever is faster on a busy machine.
            "decide": "always",
        },
        **changes,
    }
    path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    return path


def wait_until_stored(tier: Path, tokens: int, *, element_bytes: int) -> None:
    """Wait until the tier's files hold the raw KV of so many tokens: killed workers store nothing more."""
    wanted = tokens * ELEMENTS_PER_TOKEN * element_bytes
    wait_until(
        lambda: sum(512 * path.stat().st_blocks for path in tier.glob("segment-*")) >= wanted,
        f"{tokens} tokens stored in {tier}",
        timeout_s=180,
    )


def kvtc(config: Path) -> Connector:
    """Return our connector."""
    return {
        "kv_connector": "KvtcConnector",
        "kv_connector_module_path": "dynamo_kvtc.adapters.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"config": str(config)},
    }


def offloading(config: Path) -> Connector:
    """Return vLLM's native offloading with our secondary tier.

    vLLM copies to host memory on GPUs only: tests/engines/cpu_tiering.py is its spec with that copy replaced.
    """
    tier = {"type": "KvtcTier", "module_path": "dynamo_kvtc.adapters.vllm_offloading", "config": str(config)}
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "spec_name": "CpuTieringSpec",
            "spec_module_path": "cpu_tiering",
            "cpu_bytes_to_use": 256 * 1024**2,
            "block_size": TIER_BLOCK,
            "self_describing_kv_events": True,
            "secondary_tiers": [tier],
        },
    }


#: `KvtcOffloadingSpec` needs scheduler and worker in one process, as they are on a GPU; on a CPU vLLM parts
#: them unless this says otherwise.
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def offloading_spec(config: Path) -> Connector:
    """Return vLLM's native offloading with our spec, which needs `ONE_PROCESS`."""
    return {
        "kv_connector": "OffloadingConnector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {
            "spec_name": "KvtcOffloadingSpec",
            "spec_module_path": "dynamo_kvtc.adapters.vllm_offloading",
            "config": str(config),
            "block_size": TIER_BLOCK,
            "load_buffer": "256MiB",
            "self_describing_kv_events": True,
        },
    }
