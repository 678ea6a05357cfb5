"""Bases on the device: bfloat16, trimmed to the components that a plan stores, and what they take.

Channels of each head lie in pair order (`dynamo_kvtc.codec.gpu.paged`), layers apart, so that one layer's
part is contiguous. An orthonormal basis (kvtc) serves both directions in one copy; rd has two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.gpu.paged import to_pairs
from dynamo_kvtc.codec.header import Profile
from dynamo_kvtc.codec.parameters import AnyParameters, RdSideParameters, SideParameters
from dynamo_kvtc.codec.quantiser import PlanQuantiser
from dynamo_kvtc.errors import LayoutError

__all__ = ["DeviceWeights", "basis_bytes", "stored_components"]

_MOST_ELEMENTS = 2**31 - 1


def stored_components(side: SideParameters | RdSideParameters, plan_id: int) -> torch.Tensor:
    """Return the components that a plan stores, in the payload's order: int64 ``[stored]``."""
    if isinstance(side, RdSideParameters):
        return side.plans[plan_id].components
    return PlanQuantiser(side.plans[plan_id]).components


def basis_bytes(parameters: AnyParameters, plan_id: int) -> int:
    """Return the bytes of device memory that all bases of one plan take."""
    copies = 2 if parameters.profile is Profile.RD else 1
    return sum(
        2 * copies * stored_components(side, plan_id).numel() * side.mean.numel()
        for group in parameters.groups
        for side in (group.keys, group.values)
    )


@dataclass(frozen=True, eq=False)
class DeviceWeights:
    """Transform of one side of one layer group under one plan.

    Attributes
    ----------
    forward, inverse : torch.Tensor
        bfloat16 ``[layers, stored, layer_size]``; the same tensor where the basis is orthonormal.
    mean : torch.Tensor
        float32 ``[layers, layer_size]``.
    """

    forward: torch.Tensor
    inverse: torch.Tensor
    mean: torch.Tensor

    @classmethod
    def make(
        cls,
        gpu: GpuDevice,
        side: SideParameters | RdSideParameters,
        components: torch.Tensor,
        layer_size: int,
        pairs: torch.Tensor,
    ) -> DeviceWeights:
        """Put weights on the device.

        Raises
        ------
        LayoutError
            If they have more elements than kernels count.
        """
        layers = side.mean.numel() // layer_size
        if components.numel() * side.mean.numel() > _MOST_ELEMENTS:
            raise LayoutError(
                f"a basis of {components.numel()} components over {layers} layers is too large for the GPU "
                "codec; calibrate with fewer layers a group"
            )

        def arrange(weights: torch.Tensor) -> torch.Tensor:
            rows = to_pairs(weights.view(-1, layers, layer_size), pairs)
            return gpu.upload(rows.transpose(0, 1).contiguous().to(torch.bfloat16))

        forward = arrange(side.analysis(components))
        shared = isinstance(side, SideParameters)
        inverse = forward if shared else arrange(side.synthesis(components))
        return cls(forward, inverse, gpu.upload(to_pairs(side.mean.view(layers, layer_size), pairs)))
