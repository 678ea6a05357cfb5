"""The environment that keeps Dynamo on the loopback, and its frontend with the KV router."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import requests

from benchmarks.local_dynamo.processes import Managed, free_port

#: Whatever of the caller's environment would change what Dynamo, vLLM or our configuration do.
_FOREIGN = ("DYN_", "VLLM_", "DYNAMO_KVTC__", "NIXL_", "UCX_")

SESSION = requests.Session()
SESSION.trust_env = False  # a proxy has no business on the loopback


def loopback_environment(folder: Path) -> dict[str, str]:
    """Return the environment of all processes of one deployment.

    Parameters
    ----------
    folder : Path
        Discovery files go below it.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    return kept | {
        "DYN_DISCOVERY_BACKEND": "file",
        "DYN_FILE_KV": str(folder / "discovery"),
        "DYN_REQUEST_PLANE": "tcp",
        "DYN_EVENT_PLANE": "zmq",
        "DYN_TCP_RPC_HOST": "127.0.0.1",
        "DYN_TCP_RESPONSE_STREAM_HOST": "127.0.0.1",
        "DYN_HTTP_HOST": "127.0.0.1",
        "DYN_SYSTEM_HOST": "127.0.0.1",
        "PYTHONHASHSEED": "0",  # block hashes must agree between processes
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "NO_PROXY": "127.0.0.1",
    }


class Frontend:
    """`python -m dynamo.frontend` on a free port.

    Parameters
    ----------
    arguments : tuple of str
        Added to the command line.
    """

    def __init__(self, folder: Path, environment: dict[str, str], *arguments: str) -> None:
        self._port = free_port()
        command = [sys.executable, "-m", "dynamo.frontend", "--http-port", str(self._port)]
        command += ["--router-mode", "kv", *arguments]
        self.process = Managed("frontend", command, environment, folder / "frontend.log")

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self._port}{path}"

    def wait_for_workers(self, count: int = 1, *, timeout_s: float) -> None:
        """Wait until it can send requests to this many workers."""
        self.process.wait_for(
            lambda: self._workers() >= count, f"{count} workers at the frontend", timeout_s=timeout_s
        )

    def _workers(self) -> int:
        try:
            models = SESSION.get(self.url("/v1/models"), timeout=10).json()["data"]
            instances: list[dict[str, Any]] = SESSION.get(self.url("/health"), timeout=10).json()["instances"]
        except (requests.RequestException, KeyError, ValueError):
            return 0
        return sum(instance["endpoint"] == "generate" for instance in instances) if models else 0
