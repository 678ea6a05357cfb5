"""Coefficients to symbols and back in the rd profile: one step for everything, a dead zone, no side data.

All operations are in float32, one coefficient at a time, so every implementation that starts from the same
coefficients makes the same symbols.
"""

from __future__ import annotations

import torch

from dynamo_kvtc.codec.rd_plan import RdPlan, SymbolClass
from dynamo_kvtc.errors import EncodeRangeError

__all__ = ["RdQuantiser", "dequantise", "quantise"]


def quantise(u: torch.Tensor, rounding: torch.Tensor) -> torch.Tensor:
    """Return ``sign(u) * floor(|u| + rounding)``.

    Parameters
    ----------
    u : torch.Tensor
        float32, coefficients in units of the step.
    rounding : torch.Tensor
        float32 that broadcasts to `u`; 0.5 rounds to the nearest integer, less widens the dead zone.

    Returns
    -------
    torch.Tensor
        Whole numbers as float32, of the shape of `u`; NaN and infinity stay what they are.
    """
    # The sum rounds alike on both sides of 0, so cutting it off towards 0 is the floor of the magnitude.
    return torch.copysign(rounding, u).add_(u).trunc_()


def dequantise(q: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Return ``sign(q) * (|q| + offset)``, and 0 for 0.

    Parameters
    ----------
    q : torch.Tensor
        Symbols, of any dtype.
    offsets : torch.Tensor
        float32 ``[2, ...]``, each of the two broadcasts to `q`: for magnitude 1, and beyond.

    Returns
    -------
    torch.Tensor
        float32 of the shape of `q`, in units of the step.
    """
    # One of the two products is 0, so this rounds as if the offset were chosen first, but needs no mask.
    sign = q.clamp(-1, 1)
    beyond = (q - sign).clamp_(-1, 1)
    u = q.to(torch.float32, copy=True)
    return u.addcmul_(sign.sub_(beyond), offsets[0]).addcmul_(beyond, offsets[1])


class RdQuantiser:
    """Quantiser of all stored components of one plan. Coefficients and symbols are component-major.

    Parameters
    ----------
    plan : RdPlan
        The plan.
    """

    def __init__(self, plan: RdPlan) -> None:
        self._step = torch.tensor(plan.step, dtype=torch.float32)
        self._rounding = plan.rounding[:, None]
        self._offsets = plan.offsets[:, :, None]

    def quantise(self, coefficients: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Return the symbols of some tokens: int16 ``[stored, tokens]``.

        Parameters
        ----------
        coefficients : torch.Tensor
            Floating ``[stored, tokens]``, rows as in the plan.
        scales : torch.Tensor
            float32 ``[tokens]``, by the tokens' importance.

        Raises
        ------
        EncodeRangeError
            If a coefficient is NaN, infinite, or so large that its symbol is no int16.
        """
        q = quantise(coefficients.float().mul_(scales / self._step), self._rounding)
        # NaN is both the least and the largest number and fails every comparison, so it is refused here too.
        limit = SymbolClass.WIDE.limit
        if q.numel() and not (q.amin() >= -limit and q.amax() <= limit):
            raise EncodeRangeError(
                "the KV holds NaN or infinity, or coefficients beyond all symbols; keep this block raw, and "
                "recalibrate if it happens often"
            )
        return q.to(torch.int16)

    def dequantise(
        self, symbols: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Return the coefficients behind symbols, as `quantise` takes both: `dtype` ``[stored, tokens]``.

        They are computed in float32 and then rounded to `dtype`.
        """
        return dequantise(symbols, self._offsets).mul_(self._step / scales).to(dtype)
