"""What goes into ``--kv-transfer-config``."""

from __future__ import annotations

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
        "kv_connector_extra_config": {"connectors": list(connectors)},
    }
