"""A plan as values of the Helm chart in ``k8s/chart``."""

from __future__ import annotations

from typing import Any

from dynamo_kvtc.config.models import TransferConfig
from dynamo_kvtc.config.units import format_size
from dynamo_kvtc.planning.sizing import SHARED_BYTES, Plan

__all__ = ["chart_values"]

_GIB = 1 << 30


def chart_values(plan: Plan) -> dict[str, Any]:
    """Return what the chart needs to know of a plan; everything else keeps the chart's defaults.

    Keys are the chart's (``values.schema.json`` describes each).
    """
    request = plan.request
    tiers: dict[str, Any] = {"host": {"capacity": format_size(plan.held["host"].capacity)}}
    if "disk" in plan.held:
        tiers["disk"] = {
            "enabled": True,
            "capacity": format_size(plan.held["disk"].capacity),
            "volume": {"size": _gi(plan.volume)},
        }
    else:
        tiers["disk"] = {"enabled": False}
    values: dict[str, Any] = {
        "mode": request.mode,
        "connector": request.connector,
        "model": {"name": request.model.name, "blockSize": request.block_size},
        "codec": {"profile": request.profile},
        "tiers": tiers,
    }
    if request.profile != "raw":
        values["codec"]["ratio"] = _number(request.ratio)
    pool = plan.held["pool"].capacity // _GIB if "pool" in plan.held else 0
    if request.connector == "offloading":
        values["offloading"] = {"poolGiB": pool}
    elif request.connector == "kvbm":
        values["kvbm"] = {"cpuCacheGB": pool}
    if plan.staging != TransferConfig().staging:
        values["config"] = {"transfer": {"staging": format_size(plan.staging)}}
    tiered = {
        "replicas": plan.tier_workers,
        "gpus": plan.gpus_per_worker,
        "memory": _gi(plan.memory_limit),
        "sharedMemorySize": _gi(plan.shared_memory),
    }
    if request.mode == "aggregated":
        values["worker"] = tiered
        return values
    values["prefill"] = tiered
    values["decode"] = {
        "replicas": plan.workers - plan.tier_workers,
        "gpus": plan.gpus_per_worker,
        "memory": _gi(plan.memory["engine"] + SHARED_BYTES),
        "sharedMemorySize": _gi(SHARED_BYTES),
    }
    return values


def _gi(nbytes: int) -> str:
    return f"{nbytes // _GIB}Gi"


def _number(value: float) -> int | float:
    return int(value) if value == int(value) else value
