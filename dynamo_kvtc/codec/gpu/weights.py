"""Bases on the device: bfloat16, trimmed to the components that a plan stores, and what they take.

Channels of each head lie in pair order (`dynamo_kvtc.codec.gpu.paged`), layers apart, so that one layer's
part is contiguous. An orthonormal basis (kvtc) serves both directions in one copy; rd has two. Components
are padded with zeros to a multiple of `STORED_ALIGNMENT`, so that rows of coefficients begin at multiples of
128 bytes, loads of them are 16 bytes wide and asynchronous, and the inverse product needs no mask.
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

__all__ = ["STORED_ALIGNMENT", "DeviceWeights", "basis_bytes", "padded_components", "stored_components"]

#: Components are padded to multiples of this on a GPU: the depth of a step of the inverse product.
STORED_ALIGNMENT = 64

_MOST_ELEMENTS = 2**31 - 1


def stored_components(side: SideParameters | RdSideParameters, plan_id: int) -> torch.Tensor:
    """Return the components that a plan stores, in the payload's order: int64 ``[stored]``."""
    if isinstance(side, RdSideParameters):
        return side.plans[plan_id].components
    return PlanQuantiser(side.plans[plan_id]).components


def padded_components(stored: int, alignment: int = STORED_ALIGNMENT) -> int:
    """Return the rows that a basis of `stored` components takes on a device."""
    return -(-stored // alignment) * alignment


def basis_bytes(parameters: AnyParameters, plan_id: int) -> int:
    """Return the bytes of device memory that all bases of one plan take, padding counted."""
    copies = 2 if parameters.profile is Profile.RD else 1
    return sum(
        2 * copies * padded_components(stored_components(side, plan_id).numel()) * side.mean.numel()
        for group in parameters.groups
        for side in (group.keys, group.values)
    )


@dataclass(frozen=True, eq=False)
class DeviceWeights:
    """Transform of one side of one layer group under one plan.

    Attributes
    ----------
    forward, inverse : torch.Tensor
        bfloat16 ``[layers, padded, layer_size]``, zeros behind the stored components; the same tensor where
        the basis is orthonormal.
    mean : torch.Tensor
        float32 ``[layers, layer_size]``.
    stored : int
        Components that the plan stores.
    """

    forward: torch.Tensor
    inverse: torch.Tensor
    mean: torch.Tensor
    stored: int

    @property
    def padded(self) -> int:
        """Components with padding: columns of decoded coefficients."""
        return int(self.forward.shape[1])

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

        Parameters
        ----------
        components : torch.Tensor
            int64 ``[stored]``: what `stored_components` returned.
        pairs : torch.Tensor
            The order of channels on the device, of `channel_pairs`.

        Raises
        ------
        LayoutError
            If they have more elements than kernels count.
        """
        layers, stored = side.mean.numel() // layer_size, components.numel()
        padded = padded_components(stored, gpu.tile(stored, STORED_ALIGNMENT))
        if padded * side.mean.numel() > _MOST_ELEMENTS:
            raise LayoutError(
                f"a basis of {components.numel()} components over {layers} layers is too large for the GPU "
                "codec; calibrate with fewer layers a group"
            )

        def arrange(weights: torch.Tensor) -> torch.Tensor:
            rows = to_pairs(weights.view(-1, layers, layer_size), pairs)
            arranged = torch.zeros((layers, padded, layer_size), dtype=torch.bfloat16)
            arranged[:, :stored] = rows.transpose(0, 1)
            return gpu.upload(arranged)

        forward = arrange(side.analysis(components))
        shared = isinstance(side, SideParameters)
        inverse = forward if shared else arrange(side.synthesis(components))
        mean = gpu.upload(to_pairs(side.mean.view(layers, layer_size), pairs))
        return cls(forward, inverse, mean, stored)
