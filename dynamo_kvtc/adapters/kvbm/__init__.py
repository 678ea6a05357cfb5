"""KVBM with our tiers behind its host pool: ``kv_connector_module_path: dynamo_kvtc.adapters.kvbm``.

Owns: joining KVBM's connector with ours, and checking its settings against ours. Does not own: what is stored
when, which the vLLM adapter decides, nor KVBM's pools.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dynamo_kvtc.errors import MissingDependencyError

if TYPE_CHECKING:
    from dynamo_kvtc.adapters.kvbm.connector import DynamoConnector

__all__ = ["DynamoConnector"]


def __getattr__(name: str) -> object:
    # Late: the settings can be checked where neither vLLM nor KVBM is installed.
    if name != "DynamoConnector":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from dynamo_kvtc.adapters.kvbm.connector import DynamoConnector
    except ImportError as error:
        raise MissingDependencyError(
            f"the KVBM adapter needs vLLM and kvbm (pip install 'dynamo-kvtc[kvbm]'): {error}"
        ) from error
    return DynamoConnector
