"""Read artifacts: a folder with ``artifact.json`` and ``parameters.safetensors``.

The id of an artifact is a hash of its content. It is verified whenever an artifact is loaded, and it is
part of every stream and every tier key, so KV can only be decoded with the parameters that encoded it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors

from dynamo_kvtc.calibration.fingerprint import ModelFingerprint
from dynamo_kvtc.calibration.manifest import HeadShard, Manifest, RdSideManifest, SideManifest
from dynamo_kvtc.codec.geometry import CACHE_DTYPES, KvGeometry, LayerRange
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
from dynamo_kvtc.errors import ArtifactFormatError, ArtifactMismatchError, KvtcError

__all__ = ["MANIFEST_NAME", "PARAMETERS_NAME", "Artifact", "load_artifact"]

MANIFEST_NAME = "artifact.json"
PARAMETERS_NAME = "parameters.safetensors"

#: Bounds on what a reader takes into memory before it has verified anything.
_MANIFEST_BYTES = 64 << 20
_TENSOR_HEADER_BYTES = 16 << 20

#: Largest difference between a metric and its transpose, relative to its largest entry.
_METRIC_SKEW = 1e-5

#: Shape and dtype of a tensor.
_Layout = tuple[torch.Size, torch.dtype]


@dataclass(frozen=True, eq=False)
class Artifact:
    """A verified artifact.

    Attributes
    ----------
    folder : Path
        Where it was loaded from.
    manifest : Manifest
        Its ``artifact.json``.
    parameters : AnyParameters
        What a codec needs.
    variances : Mapping[tuple[int, str], torch.Tensor]
        float32 ``[rank]``, variance of each stored component, by layer group and side.
    """

    folder: Path
    manifest: Manifest
    parameters: AnyParameters
    variances: Mapping[tuple[int, str], torch.Tensor]

    @property
    def fingerprint(self) -> ModelFingerprint:
        """Identity of the model that the artifact was calibrated for."""
        return ModelFingerprint(
            self.manifest.model.architecture,
            self.parameters.geometry,
            self.parameters.rope,
            self.manifest.model.weights_hash,
        )

    def check_model(
        self, geometry: KvGeometry, rope: RopeParameters, weights_hash: str | None = None
    ) -> None:
        """Refuse a model other than the calibrated one.

        Parameters
        ----------
        geometry : KvGeometry
            Shape and dtype of the running model's whole cache; an engine that holds a part of the heads
            has another shape, and is refused.
        rope : RopeParameters
            How the running model rotates keys.
        weights_hash : str, optional
            `dynamo_kvtc.calibration.fingerprint.hash_weights` of its folder; not compared when absent.

        Raises
        ------
        ArtifactMismatchError
            Naming everything that differs.
        """
        own = self.parameters.geometry
        differences = [
            f"{name.replace('_', ' ')} {getattr(geometry, name)} instead of {getattr(own, name)}"
            for name in ("num_layers", "num_kv_heads", "head_size", "dtype")
            if getattr(geometry, name) != getattr(own, name)
        ]
        if rope != self.parameters.rope:
            differences.append(f"RoPE {rope} instead of {self.parameters.rope}")
        if weights_hash is not None and weights_hash != self.manifest.model.weights_hash:
            differences.append("other weights")
        if differences:
            raise ArtifactMismatchError(
                f"the artifact {self.folder} ({self.manifest.model.architecture}) does not fit the running "
                f"model: {'; '.join(differences)}. Point to the right artifact, or calibrate for this model "
                "with `dynamo-kvtc calibrate`"
            )


def load_artifact(folder: str | Path) -> Artifact:
    """Read and verify an artifact.

    Raises
    ------
    ArtifactFormatError
        If a part is missing, unreadable, too large, not as the schema says, or damaged.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    tensors = _read_tensors(folder, manifest)
    try:
        return _assemble(folder, manifest, tensors)
    except ArtifactFormatError:
        raise
    except KvtcError as error:
        raise ArtifactFormatError(f"the artifact {folder} contradicts itself: {error}") from error


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST_NAME
    try:
        manifest = Manifest.model_validate_json(_read_bounded(path, _MANIFEST_BYTES))
    except FileNotFoundError as error:
        raise ArtifactFormatError(
            f"{folder} holds no artifact ({MANIFEST_NAME} is missing); make one with `dynamo-kvtc calibrate`"
        ) from error
    except OSError as error:
        raise ArtifactFormatError(f"cannot read {path}: {error}; check the path and its rights") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ArtifactFormatError(
            f"{path} is damaged or of another version ({place}: {first['msg']}); "
            "copy the artifact anew or recalibrate"
        ) from error
    if manifest.content_id() != manifest.id:
        raise ArtifactFormatError(
            f"{path} was changed after calibration (its content id does not match); "
            "copy the artifact anew or recalibrate"
        )
    return manifest


def _read_tensors(folder: Path, manifest: Manifest) -> dict[str, torch.Tensor]:
    path = folder / PARAMETERS_NAME
    damaged = f"{path} is damaged; copy the artifact anew or recalibrate"
    expected = _tensor_layout(manifest)
    content = sum(shape.numel() * dtype.itemsize for shape, dtype in expected.values())
    if not content <= manifest.parameters.size <= content + _TENSOR_HEADER_BYTES:
        raise ArtifactFormatError(f"{damaged} (its size does not fit the manifest)")
    try:
        data = _read_bounded(path, manifest.parameters.size)
    except OSError as error:
        raise ArtifactFormatError(f"cannot read {path}: {error}; copy the artifact anew") from error
    if len(data) != manifest.parameters.size or _hash(data) != manifest.parameters.blake2b:
        raise ArtifactFormatError(damaged)
    try:
        tensors = load_tensors(data)
    except (SafetensorError, TypeError, ValueError, RuntimeError) as error:
        # Shapes that torch cannot take raise its errors, not safetensors'.
        raise ArtifactFormatError(f"{damaged} ({error})") from error
    found = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    if found != expected:
        raise ArtifactFormatError(f"{damaged} (its tensors are not those of the manifest)")
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise ArtifactFormatError(f"{path} holds NaN or infinity; recalibrate")
    return tensors


def _tensor_layout(manifest: Manifest) -> dict[str, _Layout]:
    """Return shape and dtype of every tensor that the manifest promises."""
    layout: dict[str, _Layout] = {}
    head_size = manifest.model.head_size
    basis_dtype = CACHE_DTYPES[manifest.parameters.basis_dtype]
    for index, group in enumerate(manifest.groups):
        heads = group.num_layers * manifest.model.num_kv_heads
        row = heads * head_size
        for name, side in (("keys", group.keys), ("values", group.values)):
            promised: dict[str, _Layout] = {
                "mean": (torch.Size([row]), torch.float32),
                "basis": (torch.Size([side.rank, row]), basis_dtype),
                "variances": (torch.Size([side.rank]), torch.float32),
            }
            if isinstance(side, RdSideManifest):
                promised["metric"] = (torch.Size([heads, head_size, head_size]), torch.float32)
                promised["importance"] = (torch.Size([row]), torch.float32)
                for plan in side.plans:
                    stored = sum(plan.counts)
                    place = f"plans.{plan.plan_id}"
                    promised[f"{place}.components"] = (torch.Size([stored]), torch.int32)
                    promised[f"{place}.rounding"] = (torch.Size([stored]), torch.float32)
                    promised[f"{place}.offsets"] = (torch.Size([2, stored]), torch.float32)
            layout |= {f"{index}.{name}.{kind}": part for kind, part in promised.items()}
    return layout


def _assemble(folder: Path, manifest: Manifest, tensors: Mapping[str, torch.Tensor]) -> Artifact:
    model = manifest.model
    per_layer = [len(errors) for entry in manifest.expected_error for errors in (entry.keys, entry.values)]
    if any(length != model.num_layers for length in per_layer):
        raise ArtifactFormatError(f"the expected errors of {folder} are not one per layer")
    if manifest.head_shard != HeadShard(first=0, count=model.num_kv_heads, total=model.num_kv_heads):
        raise ArtifactFormatError(
            f"the artifact {folder} covers a part of the KV heads only, which this version cannot use"
        )
    ratios = {entry.plan_id: entry.ratio for entry in manifest.ratios}
    groups = []
    for index, group in enumerate(manifest.groups):
        sides = []
        for name, side in (("keys", group.keys), ("values", group.values)):
            plan_ids = [plan.plan_id for plan in side.plans]
            if len(set(plan_ids)) != len(plan_ids) or set(plan_ids) != ratios.keys():
                raise ArtifactFormatError(f"the artifact {folder} lacks a plan for one of its ratios")
            prefix = f"{index}.{name}."
            own = {key.removeprefix(prefix): tensors[key] for key in tensors if key.startswith(prefix)}
            sides.append(_rd_side(own, side) if isinstance(side, RdSideManifest) else _side(own, side))
        keys, values = sides
        groups.append(GroupParameters(LayerRange(group.first_layer, group.num_layers), keys, values))
    parameters: AnyParameters = CodecParameters(
        artifact_id=bytes.fromhex(manifest.id),
        geometry=KvGeometry(model.num_layers, model.num_kv_heads, model.head_size, model.dtype),
        rope=RopeParameters.from_dict(model.rope),
        groups=tuple(groups),
        ratios=ratios,
        divergences={entry.plan_id: entry.measured.kl for entry in manifest.ratios if entry.measured},
        profile=Profile[manifest.profile.upper()],
    )
    variances = {
        (index, name): tensors[f"{index}.{name}.variances"]
        for index in range(len(groups))
        for name in ("keys", "values")
    }
    return Artifact(folder, manifest, parameters, variances)


def _side(tensors: Mapping[str, torch.Tensor], manifest: SideManifest) -> SideParameters:
    return SideParameters(
        mean=tensors["mean"],
        basis=tensors["basis"].float(),
        plans={
            plan.plan_id: BitPlan(
                tuple(PlanGroup(start, size, QuantType[name.upper()]) for start, size, name in plan.groups)
            )
            for plan in manifest.plans
        },
    )


def _rd_side(tensors: Mapping[str, torch.Tensor], manifest: RdSideManifest) -> RdSideParameters:
    metric = tensors["metric"]
    skew = (metric - metric.mT).abs().amax()
    if skew > _METRIC_SKEW * metric.abs().amax() or torch.linalg.cholesky_ex(metric).info.any():
        raise ArtifactFormatError("a metric is not symmetric and positive definite; recalibrate")
    return RdSideParameters(
        mean=tensors["mean"],
        basis=tensors["basis"].float(),
        metric=metric,
        importance=tensors["importance"],
        importance_bias=manifest.importance_bias,
        plans={
            plan.plan_id: RdPlan(
                step=plan.step,
                components=tensors[f"plans.{plan.plan_id}.components"].long(),
                counts=plan.counts,
                rounding=tensors[f"plans.{plan.plan_id}.rounding"],
                offsets=tensors[f"plans.{plan.plan_id}.offsets"],
            )
            for plan in manifest.plans
        },
    )


def _read_bounded(path: Path, limit: int) -> bytes:
    """Read a file of at most `limit` bytes; of a longer one, only its beginning and one byte more."""
    with path.open("rb") as file:
        return file.read(min(limit + 1, path.stat().st_size + 1))


def _hash(data: bytes) -> str:
    return blake2b(data, digest_size=32).hexdigest()
