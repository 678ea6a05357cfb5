"""Keys or values of one layer group under one plan, in the rd profile."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from dynamo_kvtc.codec.importance import predict_levels, scales
from dynamo_kvtc.codec.parameters import RdSideParameters
from dynamo_kvtc.codec.rd_packing import RdLayout, RdSection, pack, unpack
from dynamo_kvtc.codec.rd_quantiser import RdQuantiser
from dynamo_kvtc.codec.side import Chunks, SideCodec
from dynamo_kvtc.codec.transform import SideTransform
from dynamo_kvtc.errors import EncodeRangeError

__all__ = ["RdSideCodec"]


class RdSideCodec(SideCodec):
    """Strings importance, transform, quantiser and packing together.

    Parameters
    ----------
    side : RdSideParameters
        Mean, basis, metric, importance and plans.
    plan_id : int
        The plan to follow.
    layer_size : int
        Elements of one layer in a row.
    dtype : torch.dtype
        dtype of the products.
    """

    def __init__(self, side: RdSideParameters, plan_id: int, layer_size: int, dtype: torch.dtype) -> None:
        plan = side.plans[plan_id]
        super().__init__(SideTransform(side, plan.components, layer_size, dtype))
        self._side = side
        self._quantiser = RdQuantiser(plan)
        self._layout = RdLayout(plan.counts)

    def max_chunks(self, tokens: int) -> Chunks:
        """Return the chunks of a payload with the most escapes; see `SideCodec.max_chunks`."""
        return self._layout.max_chunks(tokens)

    def payload_bounds(self, tokens: int) -> tuple[int, int]:
        """Return the sizes of payloads without escapes and with the most."""
        return self._layout.payload_bounds(tokens)

    def encode(self, rows: torch.Tensor) -> tuple[NDArray[np.uint8], Chunks]:
        """Return the payload of rows and its chunks; see `SideCodec.encode`.

        Raises
        ------
        EncodeRangeError
            If the rows hold NaN or infinity, or are so unlike the calibration text that symbols or
            escapes do not hold them.
        """
        # A plan without components leaves no symbols whose range could be checked.
        if not sum(self._layout.counts) and not torch.isfinite(rows).all():
            raise EncodeRangeError("the KV holds NaN or infinity; keep this block raw")
        side = self._side
        centred = self._transform.centre(rows)
        levels = predict_levels(centred, side.importance, side.importance_bias)
        symbols = self._quantiser.quantise(self._transform.project(centred), scales(levels))
        payload = pack(RdSection(levels.numpy(), symbols.numpy()), self._layout)
        return payload, self._layout.chunks(levels.numel(), payload.size)

    def decode(self, payload: NDArray[np.uint8], tokens: int) -> torch.Tensor:
        """Return the coefficients of a payload, scales undone; see `SideCodec.decode`."""
        section = unpack(payload, self._layout, tokens)
        factors = scales(torch.from_numpy(section.levels))
        symbols = torch.from_numpy(section.symbols)
        return self._quantiser.dequantise(symbols, factors, self._transform.dtype).t().contiguous()
