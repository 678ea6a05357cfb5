"""Write artifacts, atomically. Kept apart from reading, which alone is needed while serving."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save as save_tensors

from dynamo_kvtc import __version__
from dynamo_kvtc.calibration.artifact import MANIFEST_NAME, PARAMETERS_NAME, Artifact, load_artifact
from dynamo_kvtc.calibration.fingerprint import ModelFingerprint
from dynamo_kvtc.calibration.manifest import (
    CalibrationRecord,
    ExpectedError,
    GroupManifest,
    HeadShard,
    Manifest,
    MeasuredManifest,
    ModelManifest,
    ParametersFile,
    PlanManifest,
    RatioManifest,
    RdPlanManifest,
    RdSideManifest,
    SideManifest,
)
from dynamo_kvtc.codec.geometry import LayerRange
from dynamo_kvtc.codec.plan import BitPlan
from dynamo_kvtc.codec.rd_plan import RdPlan
from dynamo_kvtc.errors import CalibrationError

__all__ = ["AnyFittedSide", "FittedRdSide", "FittedSide", "MeasuredPlan", "write_artifact"]


@dataclass(frozen=True, eq=False)
class FittedSide:
    """What calibration found for the keys or values of one layer group.

    Attributes
    ----------
    mean : torch.Tensor
        float32 ``[row]``.
    basis : torch.Tensor
        ``[rank, row]`` in the dtype in which it is stored.
    variances : torch.Tensor
        float32 ``[rank]``.
    total_variance : float
        Variance of all components, stored or not.
    plans : Mapping[int, BitPlan]
        Bit plan by plan id.
    errors : Mapping[int, tuple[float, ...]]
        Relative squared error of each layer of the group, by plan id.
    """

    mean: torch.Tensor
    basis: torch.Tensor
    variances: torch.Tensor
    total_variance: float
    plans: Mapping[int, BitPlan]
    errors: Mapping[int, tuple[float, ...]]


@dataclass(frozen=True, eq=False)
class FittedRdSide:
    """What calibration of the rd profile found for the keys or values of one layer group.

    Attributes
    ----------
    mean, basis : torch.Tensor
        As of `FittedSide`; the basis is that of rows in the metric's space.
    metric : torch.Tensor
        float32 ``[layers * num_kv_heads, head_size, head_size]``, symmetric and positive definite.
    importance, importance_bias : torch.Tensor, float
        float32 ``[row]`` and a constant, see `dynamo_kvtc.codec.importance`.
    variances, total_variance : torch.Tensor, float
        As of `FittedSide`, in the metric's space.
    plans : Mapping[int, RdPlan]
        Plan by plan id.
    errors : Mapping[int, tuple[float, ...]]
        Relative squared error of each layer of the group, by plan id.
    """

    mean: torch.Tensor
    basis: torch.Tensor
    metric: torch.Tensor
    importance: torch.Tensor
    importance_bias: float
    variances: torch.Tensor
    total_variance: float
    plans: Mapping[int, RdPlan]
    errors: Mapping[int, tuple[float, ...]]


@dataclass(frozen=True)
class MeasuredPlan:
    """What the streams of one plan do, measured on documents that took no part in the fit.

    Attributes
    ----------
    ratio : float
        16-bit bytes in over all bytes out.
    kl : float
        Next-token divergence from the uncompressed cache, in nats.
    top1 : float
        Share of tokens whose most likely next token is the same, 0 to 1.
    tokens : int, optional
        How many tokens were scored.
    """

    ratio: float
    kl: float
    top1: float
    tokens: int | None = None


#: What calibration found for a side, by profile.
AnyFittedSide = FittedSide | FittedRdSide


def write_artifact(
    folder: Path,
    *,
    fingerprint: ModelFingerprint,
    layer_groups: Sequence[LayerRange],
    sides: Sequence[tuple[AnyFittedSide, AnyFittedSide]],
    ratios: Mapping[int, float],
    calibration: CalibrationRecord,
    measured: Mapping[int, MeasuredPlan] | None = None,
) -> Artifact:
    """Write an artifact; the folder holds a valid one only once everything is on disk.

    Parameters
    ----------
    folder : Path
        Created if absent. An artifact in it is replaced.
    fingerprint : ModelFingerprint
        The calibrated model.
    layer_groups : Sequence[LayerRange]
        Layer groups in order.
    sides : Sequence[tuple[AnyFittedSide, AnyFittedSide]]
        Keys and values of each layer group, all of one type; the artifact's profile follows from it.
    ratios : Mapping[int, float]
        Nominal ratio by plan id.
    calibration : CalibrationRecord
        What the artifact was calibrated on.
    measured : Mapping[int, MeasuredPlan], optional
        What was measured with each plan, by plan id; for profile rd.

    Returns
    -------
    Artifact
        The artifact as `load_artifact` reads it back.

    Raises
    ------
    CalibrationError
        If not all plans of profile rd were measured, or any of kvtc.
    ArtifactFormatError
        If what was written is no valid artifact.
    """
    measured = measured or {}
    profile: Literal["rd", "kvtc"] = "rd" if isinstance(sides[0][0], FittedRdSide) else "kvtc"
    if measured.keys() != (ratios.keys() if profile == "rd" else set()):
        raise CalibrationError(
            f"plans {sorted(ratios)} of profile {profile} are written, plans {sorted(measured)} were measured"
        )
    tensors = save_tensors(_named_tensors(sides))
    geometry = fingerprint.geometry
    draft = Manifest(
        id="0" * 64,
        profile=profile,
        tool_version=__version__,
        model=_model_manifest(fingerprint),
        head_shard=HeadShard(first=0, count=geometry.num_kv_heads, total=geometry.num_kv_heads),
        calibration=calibration,
        ratios=[
            RatioManifest(
                plan_id=plan_id,
                ratio=ratio,
                measured=MeasuredManifest(**asdict(measured[plan_id])) if plan_id in measured else None,
            )
            for plan_id, ratio in ratios.items()
        ],
        groups=[
            GroupManifest(
                first_layer=layers.first,
                num_layers=layers.count,
                keys=_side_manifest(keys),
                values=_side_manifest(values),
            )
            for layers, (keys, values) in zip(layer_groups, sides, strict=True)
        ],
        expected_error=[
            ExpectedError(
                plan_id=plan_id,
                keys=[error for keys, _ in sides for error in keys.errors[plan_id]],
                values=[error for _, values in sides for error in values.errors[plan_id]],
            )
            for plan_id in ratios
        ],
        parameters=ParametersFile(
            size=len(tensors),
            blake2b=blake2b(tensors, digest_size=32).hexdigest(),
            basis_dtype=str(sides[0][0].basis.dtype).removeprefix("torch."),  # type: ignore[arg-type]
        ),
    )
    manifest = draft.model_copy(update={"id": draft.content_id()})

    folder.mkdir(parents=True, exist_ok=True)
    # Without artifact.json there is no artifact, so a reader never sees new tensors under an old manifest.
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    _write_file(folder / PARAMETERS_NAME, tensors)
    _write_file(folder / MANIFEST_NAME, (manifest.model_dump_json(indent=1) + "\n").encode())
    return load_artifact(folder)


def _named_tensors(sides: Sequence[tuple[AnyFittedSide, AnyFittedSide]]) -> dict[str, torch.Tensor]:
    return {
        f"{group}.{name}.{kind}": tensor
        for group, pair in enumerate(sides)
        for name, side in zip(("keys", "values"), pair, strict=True)
        for kind, tensor in _tensors(side).items()
    }


def _tensors(side: AnyFittedSide) -> dict[str, torch.Tensor]:
    tensors = {"mean": side.mean, "basis": side.basis, "variances": side.variances}
    if isinstance(side, FittedRdSide):
        tensors |= {"metric": side.metric, "importance": side.importance}
        for plan_id, plan in side.plans.items():
            tensors[f"plans.{plan_id}.components"] = plan.components.int()
            # Copied, since safetensors refuses tensors that plans share.
            tensors[f"plans.{plan_id}.rounding"] = plan.rounding.clone()
            tensors[f"plans.{plan_id}.offsets"] = plan.offsets.clone()
    return {kind: tensor.contiguous() for kind, tensor in tensors.items()}


def _model_manifest(fingerprint: ModelFingerprint) -> ModelManifest:
    geometry = fingerprint.geometry
    return ModelManifest(
        architecture=fingerprint.architecture,
        num_layers=geometry.num_layers,
        num_kv_heads=geometry.num_kv_heads,
        head_size=geometry.head_size,
        dtype=geometry.dtype,  # type: ignore[arg-type]  # KvGeometry admits these names only
        rope=fingerprint.rope.to_dict(),
        weights_hash=fingerprint.weights_hash,
    )


def _side_manifest(side: AnyFittedSide) -> SideManifest | RdSideManifest:
    rank = side.basis.shape[0]
    explained_variance = float(side.variances.sum(dtype=torch.float64)) / side.total_variance
    if isinstance(side, FittedRdSide):
        return RdSideManifest(
            rank=rank,
            total_variance=side.total_variance,
            explained_variance=explained_variance,
            importance_bias=side.importance_bias,
            plans=[
                RdPlanManifest(plan_id=plan_id, step=plan.step, counts=plan.counts)
                for plan_id, plan in side.plans.items()
            ],
        )
    return SideManifest(
        rank=rank,
        total_variance=side.total_variance,
        explained_variance=explained_variance,
        plans=[
            PlanManifest(
                plan_id=plan_id,
                bits_per_token=plan.bits_per_token,
                groups=[(group.start, group.size, group.type.name.lower()) for group in plan.groups],  # type: ignore[misc]
            )
            for plan_id, plan in side.plans.items()
        ],
    )


def _write_file(path: Path, data: bytes) -> None:
    scratch = path.with_name(f".{path.name}.partial")
    with scratch.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
