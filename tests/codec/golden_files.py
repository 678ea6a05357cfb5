"""Where golden streams lie, and how the parameters beside them are written and read."""

from __future__ import annotations

import base64
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from dynamo_kvtc.codec.geometry import KvGeometry, LayerRange
from dynamo_kvtc.codec.header import Profile
from dynamo_kvtc.codec.parameters import (
    AnyParameters,
    CodecParameters,
    GroupParameters,
    RdSideParameters,
    SideParameters,
)
from dynamo_kvtc.codec.plan import BitPlan, PlanGroup, QuantType
from dynamo_kvtc.codec.rd_plan import RdPlan
from dynamo_kvtc.codec.rope import RopeParameters

GOLDEN = Path(__file__).parents[1] / "golden"


def parameter_file(case: str) -> Path:
    """The parameters of the stream ``<case>.kvtc``."""
    return GOLDEN / f"{case.split('.')[0]}.json"


def plan(*groups: tuple[int, int, str]) -> BitPlan:
    return BitPlan(tuple(PlanGroup(start, size, QuantType[name]) for start, size, name in groups))


def to_json(parameters: AnyParameters) -> str:
    def array(tensor: torch.Tensor) -> str:
        return base64.b64encode(tensor.numpy().astype("<f2").tobytes()).decode()

    def side(part: SideParameters | RdSideParameters) -> dict[str, object]:
        if isinstance(part, RdSideParameters):
            return rd_side(part)
        plans = {
            str(plan_id): [[group.start, group.size, group.type.name] for group in plan.groups]
            for plan_id, plan in part.plans.items()
        }
        return {"mean": array(part.mean), "basis": array(part.basis), "plans": plans}

    def rd_side(part: RdSideParameters) -> dict[str, object]:
        plans = {
            str(plan_id): {
                "step": plan.step,
                "components": plan.components.tolist(),
                "counts": plan.counts,
                "rounding": array(plan.rounding),
                "offsets": array(plan.offsets),
            }
            for plan_id, plan in part.plans.items()
        }
        return {
            "mean": array(part.mean), "basis": array(part.basis), "metric": array(part.metric),
            "importance": array(part.importance), "importance_bias": part.importance_bias, "plans": plans,
        }  # fmt: skip

    data = {
        "profile": parameters.profile.name,
        "artifact_id": parameters.artifact_id.hex(),
        "geometry": asdict(parameters.geometry),
        "rope": parameters.rope.to_dict(),
        "ratios": {str(plan_id): ratio for plan_id, ratio in parameters.ratios.items()},
        "groups": [
            {"first": group.layers.first, "count": group.layers.count, "keys": side(group.keys),
             "values": side(group.values)}
            for group in parameters.groups
        ],
    }  # fmt: skip
    return json.dumps(data, indent=1) + "\n"


def from_json(text: str) -> AnyParameters:
    data = json.loads(text)

    def array(encoded: str) -> torch.Tensor:
        return torch.from_numpy(np.frombuffer(base64.b64decode(encoded), "<f2").astype(np.float32))

    def side(part: dict) -> SideParameters | RdSideParameters:
        mean = array(part["mean"])
        if "metric" in part:
            return rd_side(part, mean)
        plans = {int(plan_id): plan(*groups) for plan_id, groups in part["plans"].items()}
        return SideParameters(mean, array(part["basis"]).view(-1, mean.numel()), plans)

    def rd_side(part: dict, mean: torch.Tensor) -> RdSideParameters:
        size = data["geometry"]["head_size"]
        plans = {
            int(plan_id): RdPlan(
                step=plan["step"],
                components=torch.tensor(plan["components"], dtype=torch.int64),
                counts=tuple(plan["counts"]),
                rounding=array(plan["rounding"]),
                offsets=array(plan["offsets"]).view(2, -1),
            )
            for plan_id, plan in part["plans"].items()
        }
        return RdSideParameters(
            mean,
            array(part["basis"]).view(-1, mean.numel()),
            array(part["metric"]).view(-1, size, size),
            array(part["importance"]),
            part["importance_bias"],
            plans,
        )

    groups = tuple(
        GroupParameters(
            LayerRange(group["first"], group["count"]), side(group["keys"]), side(group["values"])
        )
        for group in data["groups"]
    )
    return CodecParameters(
        bytes.fromhex(data["artifact_id"]),
        KvGeometry(**data["geometry"]),
        RopeParameters.from_dict(data["rope"]),
        groups,
        {int(plan_id): ratio for plan_id, ratio in data["ratios"].items()},
        profile=Profile[data.get("profile", "KVTC")],
    )
