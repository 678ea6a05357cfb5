"""Where a measurement was made: everything that its numbers depend on, nothing that names the machine."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dynamo_kvtc import __version__

__all__ = ["describe_environment"]

_PACKAGES: Sequence[str] = ("torch", "transformers", "nixl-cu13", "nixl-cu12", "isal", "numpy")


def describe_environment() -> dict[str, Any]:
    """Return CPU model, usable cores, torch's threads, versions and the date (UTC), JSON-ready."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {"dynamo-kvtc": __version__, **_package_versions()},
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def _package_versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
