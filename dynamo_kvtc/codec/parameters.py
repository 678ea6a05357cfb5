"""The calibrated parameters a codec works with, in memory.

Owns the data structure only. Reading and writing artifacts belongs to `dynamo_kvtc.calibration`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from dynamo_kvtc.codec.geometry import KvGeometry, LayerRange
from dynamo_kvtc.codec.plan import BitPlan
from dynamo_kvtc.codec.rope import RopeParameters
from dynamo_kvtc.errors import ArtifactFormatError, ArtifactMismatchError

__all__ = ["ARTIFACT_ID_BYTES", "CodecParameters", "GroupParameters", "SideParameters"]

#: Bytes of an artifact id: a BLAKE2b digest of the artifact's content.
ARTIFACT_ID_BYTES = 32


@dataclass(frozen=True, eq=False)
class SideParameters:
    """Transform and plans of the keys (before RoPE) or the values of one layer group.

    Attributes
    ----------
    mean : torch.Tensor
        float32 ``[row]``, ``row = layers of the group * num_kv_heads * head_size``, layer-major, then
        head, then channel.
    basis : torch.Tensor
        float32 ``[components, row]``, orthonormal rows by falling variance. Rows that no plan reaches
        may be absent. ``coefficients = (row - mean) @ basis.T``; ``row = coefficients @ basis + mean``.
    plans : Mapping[int, BitPlan]
        Bit plan by plan id; the ids are the same for all sides and layer groups of an artifact.
    """

    mean: torch.Tensor
    basis: torch.Tensor
    plans: Mapping[int, BitPlan]

    def __post_init__(self) -> None:
        if self.mean.ndim != 1 or self.basis.ndim != 2 or self.basis.shape[1] != self.mean.shape[0]:
            raise ArtifactFormatError(
                f"mean {tuple(self.mean.shape)} and basis {tuple(self.basis.shape)} do not fit together"
            )
        rank = max((plan.rank for plan in self.plans.values()), default=0)
        if rank > self.basis.shape[0]:
            raise ArtifactFormatError(f"a plan reaches component {rank}, the basis has {self.basis.shape[0]}")


@dataclass(frozen=True, eq=False)
class GroupParameters:
    """One layer group: consecutive layers with a basis of their own, decoded as one unit."""

    layers: LayerRange
    keys: SideParameters
    values: SideParameters


@dataclass(frozen=True, eq=False)
class CodecParameters:
    """Everything that a stream's bytes depend on besides the KV itself.

    Attributes
    ----------
    artifact_id : bytes
        `ARTIFACT_ID_BYTES` bytes; written to every stream and part of every tier key.
    geometry : KvGeometry
        Shape and dtype of the cache the artifact serves.
    rope : RopeParameters
        How keys are rotated in this model.
    groups : tuple[GroupParameters, ...]
        Layer groups in layer order; together they cover all layers exactly once.
    ratios : Mapping[int, float]
        Nominal ratio (before entropy coding) by plan id.
    """

    artifact_id: bytes
    geometry: KvGeometry
    rope: RopeParameters
    groups: tuple[GroupParameters, ...]
    ratios: Mapping[int, float]

    def __post_init__(self) -> None:
        if len(self.artifact_id) != ARTIFACT_ID_BYTES:
            raise ArtifactFormatError(
                f"artifact id has {len(self.artifact_id)} bytes, not {ARTIFACT_ID_BYTES}"
            )
        position = 0
        for group in self.groups:
            row = group.layers.count * self.geometry.layer_size
            if (
                group.layers.first != position
                or row != group.keys.mean.numel()
                or row != group.values.mean.numel()
            ):
                raise ArtifactFormatError(
                    f"layer group at layer {group.layers.first} does not fit {self.geometry}"
                )
            position = group.layers.stop
        if position != self.geometry.num_layers:
            raise ArtifactFormatError(f"layer groups cover {position} of {self.geometry.num_layers} layers")

    def plan_id(self, ratio: float) -> int:
        """Return the id of the plan calibrated for a nominal ratio.

        Raises
        ------
        ArtifactMismatchError
            If the artifact has no plan for this ratio.
        """
        for plan_id, nominal in self.ratios.items():
            if abs(nominal - ratio) < 1e-9:
                return plan_id
        known = ", ".join(f"{r:g}" for r in sorted(self.ratios.values()))
        raise ArtifactMismatchError(
            f"the artifact has no bit plan for ratio {ratio:g} (it has {known}); "
            f"choose one of these or recalibrate with --ratios"
        )
