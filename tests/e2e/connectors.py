"""What goes into ``--kv-transfer-config``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Connector = dict[str, Any]


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
        # Whole tier blocks of 256 tokens, from the first request on.
        "policy": {"recent_window": 0, "minimum_tokens": 0},
        **changes,
    }
    path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    return path


def kvtc(config: Path) -> Connector:
    """Return our connector."""
    return {
        "kv_connector": "KvtcConnector",
        "kv_connector_module_path": "dynamo_kvtc.adapters.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"config": str(config)},
    }
