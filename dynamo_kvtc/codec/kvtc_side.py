"""Keys or values of one layer group under one bit plan, in the kvtc profile."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from dynamo_kvtc.codec.packing import SectionLayout, pack, unpack
from dynamo_kvtc.codec.parameters import SideParameters
from dynamo_kvtc.codec.quantiser import PlanQuantiser
from dynamo_kvtc.codec.side import Chunks, SideCodec
from dynamo_kvtc.codec.transform import SideTransform
from dynamo_kvtc.errors import EncodeRangeError

__all__ = ["KvtcSideCodec"]


class KvtcSideCodec(SideCodec):
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
    """

    def __init__(self, side: SideParameters, plan_id: int, layer_size: int, dtype: torch.dtype) -> None:
        self._quantiser = PlanQuantiser(side.plans[plan_id])
        self._layout = SectionLayout.of(self._quantiser)
        super().__init__(SideTransform(side, self._quantiser.components, layer_size, dtype))

    def max_chunks(self, tokens: int) -> Chunks:
        """Return the chunks of a payload, each of one run; see `SideCodec.max_chunks`."""
        return [(size,) for size in self._layout.chunk_sizes(tokens)]

    def payload_bounds(self, tokens: int) -> tuple[int, int]:
        """Return the bytes of a payload of some coded tokens, twice."""
        size = self._layout.payload_size(tokens)
        return size, size

    def encode(self, rows: torch.Tensor) -> tuple[NDArray[np.uint8], Chunks]:
        """Return the payload of rows and its chunks; see `SideCodec.encode`."""
        # A plan without groups leaves no side data whose range could be checked.
        if not self._layout.num_groups and not torch.isfinite(rows).all():
            raise EncodeRangeError("the KV holds NaN or infinity; keep this block raw")
        payload = pack(self._quantiser.quantise(self._transform.forward(rows)))
        return payload, self.max_chunks(rows.shape[0])

    def decode(self, payload: NDArray[np.uint8], tokens: int) -> torch.Tensor:
        """Return the coefficients of a payload; see `SideCodec.decode`."""
        section = unpack(payload, self._layout, tokens)
        # Turned once here, each layer's product is half as long again faster.
        return self._quantiser.dequantise(section, self._transform.dtype).t().contiguous()
