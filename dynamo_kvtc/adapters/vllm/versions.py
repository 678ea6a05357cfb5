"""Which versions of vLLM this adapter knows."""

from __future__ import annotations

import importlib
import re

from dynamo_kvtc.errors import ConfigError, MissingDependencyError

__all__ = ["SUPPORTED", "check_version", "require_vllm"]

#: Major and minor versions whose connector interface the adapter was written and tested against.
SUPPORTED = ((0, 31), (0, 32))


def require_vllm() -> None:
    """Refuse to go on without a vLLM that this adapter knows.

    Raises
    ------
    MissingDependencyError
        If vLLM is not installed.
    ConfigError
        If it is another version.
    """
    try:
        vllm = importlib.import_module("vllm")
    except ImportError as error:
        raise MissingDependencyError(
            "this adapter runs inside vLLM, which is not installed here: pip install 'dynamo-kvtc[vllm]'"
        ) from error
    check_version(str(vllm.__version__))


def check_version(version: str) -> None:
    """Raise `ConfigError` unless the version is supported."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or (int(found[1]), int(found[2])) not in SUPPORTED:
        known = " and ".join(f"{major}.{minor}" for major, minor in SUPPORTED)
        raise ConfigError(
            f"this dynamo_kvtc knows vLLM {known}, not {version}: its connector interface changes between "
            "versions. Install a supported vLLM, or a dynamo_kvtc that supports this one"
        )
