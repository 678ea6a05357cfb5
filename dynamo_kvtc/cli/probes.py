"""What `doctor` tries in child processes, since it may hang, crash or print: torch, NIXL, nvCOMP.

``python -m dynamo_kvtc.cli.probes NAME`` writes one JSON object as its last line. NVIDIA's GPUDirect
Storage is not among the probes: without its driver, trying it hangs for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["PROBES", "run_probe"]

_PROBE_BYTES = 4096


def run_probe(name: str, timeout_s: float) -> dict[str, Any]:
    """Run a probe in a child process.

    Returns
    -------
    dict
        What the probe found, or ``{"error": ...}`` if it failed, crashed or did not end in time.
    """
    try:
        child = subprocess.run(
            [sys.executable, "-m", __name__, name],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"did not end within {timeout_s:g} s"}
    with contextlib.suppress(IndexError, ValueError):
        found = json.loads(child.stdout.splitlines()[-1])
        if isinstance(found, dict):
            return found
    reason = child.stderr.strip().splitlines()[-1:] or ["no message"]
    return {"error": f"ended with code {child.returncode}: {reason[0]}"}


def _torch() -> dict[str, Any]:
    import torch

    from dynamo_kvtc.codec.transform import bfloat16_hardware

    has_gpu = torch.cuda.is_available()
    return {
        "version": torch.__version__,
        "threads": torch.get_num_threads(),
        "bfloat16": bfloat16_hardware(),
        "cuda_build": torch.version.cuda,
        "gpu": torch.cuda.get_device_name(0) if has_gpu else None,
    }


def _nixl() -> dict[str, Any]:
    return asyncio.run(_try_nixl())


async def _try_nixl() -> dict[str, Any]:
    from dynamo_kvtc.transfer.agent import TransferAgent

    sent = bytes(index % 251 for index in range(_PROBE_BYTES))
    found: dict[str, Any] = {}
    async with await TransferAgent.create() as agent:
        region = await agent.allocate(3 * _PROBE_BYTES)
        first, second, third = (region.span(part * _PROBE_BYTES, _PROBE_BYTES) for part in range(3))
        first.view[:] = sent
        await agent.copy([(first, second)], timeout_s=5)
        found["ucx"] = second.view == sent
        with tempfile.TemporaryDirectory() as folder:
            file = await agent.open_file(
                Path(folder, "probe"), nbytes=_PROBE_BYTES, flags=os.O_RDWR | os.O_CREAT
            )
            await agent.write_file([(first, file.span(0, _PROBE_BYTES))], timeout_s=5)
            await agent.read_file([(file.span(0, _PROBE_BYTES), third)], timeout_s=5)
            await agent.close_file(file)
        found["posix"] = third.view == sent
        found["file_mode"] = agent.stats().file_mode
    return found


def _nvcomp() -> dict[str, Any]:
    from importlib import import_module

    import torch

    module = import_module("nvidia.nvcomp")
    return {"version": getattr(module, "__version__", "unknown"), "gpu": torch.cuda.is_available()}


PROBES = {"torch": _torch, "nixl": _nixl, "nvcomp": _nvcomp}

if __name__ == "__main__":
    try:
        outcome = PROBES[sys.argv[1]]()
    except Exception as error:
        outcome = {"error": f"{type(error).__name__}: {error}"}
    sys.stdout.write("\n" + json.dumps(outcome) + "\n")
    sys.stdout.flush()
    # A library's threads must not keep a finished probe alive.
    os._exit(0)
