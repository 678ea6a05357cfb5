"""One side of one layer group under one bit plan: rows of keys or values to payload bytes and back."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from dynamo_kvtc.codec.packing import SectionLayout, pack, unpack
from dynamo_kvtc.codec.parameters import SideParameters
from dynamo_kvtc.codec.quantiser import PlanQuantiser
from dynamo_kvtc.codec.transform import SideTransform
from dynamo_kvtc.errors import EncodeRangeError

__all__ = ["SideCodec"]


class SideCodec:
    """Strings transform, quantiser and packing together.

    Parameters
    ----------
    side : SideParameters
        Mean, basis and plans.
    plan_id : int
        The plan to follow.
    layer_size : int
        Elements of one layer in a row.
    dtype : torch.dtype
        dtype of the products.

    Attributes
    ----------
    layout : SectionLayout
        Sizes of the payload and its chunks.
    """

    def __init__(self, side: SideParameters, plan_id: int, layer_size: int, dtype: torch.dtype) -> None:
        self._quantiser = PlanQuantiser(side.plans[plan_id])
        self._transform = SideTransform(side, self._quantiser.components, layer_size, dtype)
        self.layout = SectionLayout.of(self._quantiser)

    def warm_up(self) -> None:
        """Make ready what the first `encode` and `reconstruct` would otherwise wait for."""
        self._transform.warm_up()

    def encode(self, rows: torch.Tensor) -> NDArray[np.uint8]:
        """Return the payload of float32 rows ``[tokens, row]``.

        Raises
        ------
        EncodeRangeError
            If the rows hold NaN, infinity, or coefficients that the side data cannot carry.
        """
        # A plan without groups leaves no side data whose range could be checked.
        if not self.layout.num_groups and not torch.isfinite(rows).all():
            raise EncodeRangeError("the KV holds NaN or infinity; keep this block raw")
        return pack(self._quantiser.quantise(self._transform.forward(rows)))

    def decode(self, payload: NDArray[np.uint8], tokens: int) -> torch.Tensor:
        """Return the coefficients of a payload, ``[tokens, stored]`` in the compute dtype.

        Raises
        ------
        BitstreamError
            The subclasses that `dynamo_kvtc.codec.packing.unpack` raises.
        """
        section = unpack(payload, self.layout, tokens)
        # Turned once here, each layer's product is half as long again faster.
        return self._quantiser.dequantise(section, self._transform.dtype).t().contiguous()

    def reconstruct(self, coefficients: torch.Tensor, layer: int) -> torch.Tensor:
        """Return one layer of the group, float32 ``[tokens, layer_size]``, from `decode`'s result."""
        return self._transform.inverse(coefficients, layer)
