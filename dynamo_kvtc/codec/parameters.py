"""The calibrated parameters a codec works with, in memory.

Owns the data structure only. Reading and writing artifacts belongs to `dynamo_kvtc.calibration`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from dynamo_kvtc.codec.geometry import KvGeometry, LayerRange
from dynamo_kvtc.codec.header import Profile
from dynamo_kvtc.codec.plan import BitPlan
from dynamo_kvtc.codec.rd_plan import RdPlan
from dynamo_kvtc.codec.rope import RopeParameters
from dynamo_kvtc.errors import ArtifactFormatError, ArtifactMismatchError

__all__ = [
    "ARTIFACT_ID_BYTES",
    "AnyParameters",
    "CodecParameters",
    "GroupParameters",
    "KvtcParameters",
    "RdParameters",
    "RdSideParameters",
    "SideParameters",
]

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

    def analysis(self, components: torch.Tensor) -> torch.Tensor:
        """Return the weights of encoding, float32 ``[len(components), row]``."""
        return self.basis[components]

    def synthesis(self, components: torch.Tensor) -> torch.Tensor:
        """Return the weights of decoding, float32 ``[len(components), row]``."""
        return self.basis[components]


@dataclass(frozen=True, eq=False)
class RdSideParameters:
    """Transform and plans of the rd profile, of one side of one layer group.

    Rows are first taken into a space where equal errors hurt the model equally: each layer's head is
    multiplied by its `metric`. The basis holds the principal components there. Encoding projects on
    ``analysis = basis @ blockdiag(metric)``, decoding on ``synthesis = basis @ blockdiag(metric)^-1``:
    ``coefficients = (row - mean) @ analysis.T`` and ``row = coefficients @ synthesis + mean``.

    Attributes
    ----------
    mean : torch.Tensor
        float32 ``[row]``, in the order of `SideParameters.mean`.
    basis : torch.Tensor
        float32 ``[components, row]``, orthonormal rows by falling variance.
    metric : torch.Tensor
        float32 ``[layers * num_kv_heads, head_size, head_size]``, symmetric and positive definite: roots
        of the blocks of the loss's Fisher information.
    importance, importance_bias : torch.Tensor, float
        float32 ``[row]`` and a constant, for `dynamo_kvtc.codec.importance.predict_levels`.
    plans : Mapping[int, RdPlan]
        Plan by plan id; the ids are the same for all sides and layer groups of an artifact.
    """

    mean: torch.Tensor
    basis: torch.Tensor
    metric: torch.Tensor
    importance: torch.Tensor
    importance_bias: float
    plans: Mapping[int, RdPlan]

    def __post_init__(self) -> None:
        row = self.mean.numel()
        heads, size = self.metric.shape[0], self.metric.shape[-1]
        if (
            self.mean.ndim != 1
            or self.basis.shape[1:] != (row,)
            or self.importance.shape != (row,)
            or self.metric.shape != (heads, size, size)
            or heads * size != row
        ):
            raise ArtifactFormatError(
                f"mean {tuple(self.mean.shape)}, basis {tuple(self.basis.shape)}, metric "
                f"{tuple(self.metric.shape)}, importance {tuple(self.importance.shape)} do not fit together"
            )
        rank = max((plan.rank for plan in self.plans.values()), default=0)
        if rank > self.basis.shape[0]:
            raise ArtifactFormatError(f"a plan reaches component {rank}, the basis has {self.basis.shape[0]}")

    def analysis(self, components: torch.Tensor) -> torch.Tensor:
        """Return the weights of encoding, float32 ``[len(components), row]``."""
        return self._times_blocks(components, self.metric)

    def synthesis(self, components: torch.Tensor) -> torch.Tensor:
        """Return the weights of decoding, float32 ``[len(components), row]``."""
        return self._times_blocks(components, torch.linalg.inv(self.metric.double()).float())

    def _times_blocks(self, components: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        heads = self.basis[components].view(-1, *blocks.shape[:2])
        return torch.einsum("chd,hde->che", heads, blocks).flatten(1)


SideT = TypeVar("SideT", bound=SideParameters | RdSideParameters)


@dataclass(frozen=True, eq=False)
class GroupParameters(Generic[SideT]):
    """One layer group: consecutive layers with a basis of their own, decoded as one unit."""

    layers: LayerRange
    keys: SideT
    values: SideT


@dataclass(frozen=True, eq=False)
class CodecParameters(Generic[SideT]):
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
        Nominal ratio by plan id: before entropy coding with the kvtc profile; with rd, what streams of
        calibration text reached.
    divergences : Mapping[int, float]
        Next-token KL (nats) that calibration measured with each plan on text it was not fitted to; empty
        where it was not measured.
    profile : Profile
        Which profile the sides belong to.
    """

    artifact_id: bytes
    geometry: KvGeometry
    rope: RopeParameters
    groups: tuple[GroupParameters[SideT], ...]
    ratios: Mapping[int, float]
    divergences: Mapping[int, float] = field(default_factory=dict)
    profile: Profile = Profile.KVTC

    def __post_init__(self) -> None:
        if len(self.artifact_id) != ARTIFACT_ID_BYTES:
            raise ArtifactFormatError(
                f"artifact id has {len(self.artifact_id)} bytes, not {ARTIFACT_ID_BYTES}"
            )
        side_type = RdSideParameters if self.profile is Profile.RD else SideParameters
        if not all(isinstance(s, side_type) for group in self.groups for s in (group.keys, group.values)):
            raise ArtifactFormatError(f"the sides of the layer groups are not of profile {self.profile.name}")
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

    def plan_id_within(self, max_kl: float) -> int:
        """Return the id of the plan with the highest ratio whose measured divergence is at most `max_kl`.

        Raises
        ------
        ArtifactMismatchError
            If no plan is good enough, or divergences were not measured.
        """
        good = [plan_id for plan_id, kl in self.divergences.items() if kl <= max_kl]
        if not good:
            known = ", ".join(
                f"{kl:.4g} at {self.ratios[plan_id]:g}x"
                for plan_id, kl in sorted(self.divergences.items(), key=lambda entry: entry[1])
            )
            raise ArtifactMismatchError(
                f"the artifact has no plan with a KL of at most {max_kl:g} (it has "
                f"{known or 'none measured'}); allow more, choose a ratio, or recalibrate with --max-kl"
            )
        return max(good, key=lambda plan_id: self.ratios[plan_id])


#: Parameters of one profile, or of any.
KvtcParameters = CodecParameters[SideParameters]
RdParameters = CodecParameters[RdSideParameters]
AnyParameters = CodecParameters[Any]
