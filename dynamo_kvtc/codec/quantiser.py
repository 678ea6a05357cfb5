"""Coefficients to symbols and back, with one shift and one scale per token and group of components.

The published quantiser (KVTC, section 3.2), made exact so that every implementation agrees bit for bit.
For the coefficients ``c`` of one token in one group, with ``low``, ``high`` and ``mean`` over the group,
every operation in float32 unless stated:

- INTb: ``shift = float16(low)``, ``scale = up16((high - low) / (2**b - 1))``,
  ``symbol = clamp(round_half_even((c - shift) / scale), 0, 2**b - 1)``.
- FP8: ``shift = float16(mean)`` with the mean taken in float64 and rounded to float32 first,
  ``scale = up16(max|c - shift| / 448)``, ``symbol = E4M3FN((c - shift) / scale)``, round half to even.
- A scale of 0 makes every symbol 0. Decoded: ``shift + symbol * scale``.
- No shift or scale is a negative zero, and no FP8 symbol unless a negative number was rounded to it.

``up16`` rounds up to float16, so that the scaled range always covers the group. A group of size 1 has
``low == high``: its value is the shift alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dynamo_kvtc.codec.plan import BitPlan, QuantType
from dynamo_kvtc.errors import EncodeRangeError

__all__ = [
    "E4M3_MAX",
    "STORED_TYPES",
    "PlanQuantiser",
    "QuantisedSection",
    "e4m3_to_float",
    "float_to_e4m3",
    "simulate",
]

#: Largest finite E4M3FN number.
E4M3_MAX = 448.0

#: Types that leave symbols in a payload, in the payload's order.
STORED_TYPES: tuple[QuantType, ...] = (QuantType.FP8, QuantType.INT4, QuantType.INT2)


@dataclass(frozen=True, eq=False)
class QuantisedSection:
    """The quantised keys or values of one layer group of one tier block.

    Attributes
    ----------
    side : torch.Tensor
        float16 ``[2 * groups, tokens]``: the shifts of all groups, then their scales.
    symbols : dict[QuantType, torch.Tensor]
        uint8 ``[components of the type, tokens]`` for each of `STORED_TYPES`, ascending components; E4M3FN
        bit patterns or integers.
    """

    side: torch.Tensor
    symbols: dict[QuantType, torch.Tensor]


def simulate(coefficients: torch.Tensor, quant_type: QuantType) -> torch.Tensor:
    """Return what coefficients decode to after quantisation; each run of the last dimension is a group.

    Parameters
    ----------
    coefficients : torch.Tensor
        Floating ``[..., size]``.
    quant_type : QuantType
        ``NONE`` gives zeros, as components that are not stored decode to.

    Returns
    -------
    torch.Tensor
        float32, of the shape of `coefficients`.

    Raises
    ------
    EncodeRangeError
        If a shift or scale is not a finite float16.
    """
    c = coefficients.float()
    if quant_type is QuantType.NONE:
        return torch.zeros_like(c)
    low, high = c.amin(-1, keepdim=True), c.amax(-1, keepdim=True)
    mean = c.mean(-1, keepdim=True, dtype=torch.float64) if quant_type is QuantType.FP8 else None
    shift, scale = _side_data(quant_type, low, high, mean)
    _check_finite(shift, scale)
    symbols = _to_symbols(quant_type, c, shift.float(), scale.float())
    return _to_values(quant_type, symbols, shift.float(), scale.float())


class PlanQuantiser:
    """Quantiser of all groups of one bit plan at once. Coefficients are component-major.

    Parameters
    ----------
    plan : BitPlan
        The allocation.

    Attributes
    ----------
    num_groups : int
        Groups of the plan.
    components : torch.Tensor
        int64 ``[stored]``: the component in each row of the coefficients that this class takes and
        returns; those of `STORED_TYPES` one after the other, ascending within a type.
    counts : dict[QuantType, int]
        Components per stored type.
    """

    def __init__(self, plan: BitPlan) -> None:
        self.num_groups = len(plan.groups)
        self.counts: dict[QuantType, int] = {}
        self._types: list[_TypeRows] = []
        components: list[torch.Tensor] = [torch.empty(0, dtype=torch.int64)]
        start = 0
        for quant_type in STORED_TYPES:
            ids = [index for index, group in enumerate(plan.groups) if group.type is quant_type]
            sizes = torch.tensor([plan.groups[index].size for index in ids], dtype=torch.int64)
            count = int(sizes.sum())
            self.counts[quant_type] = count
            if not count:
                continue
            components += [torch.arange(plan.groups[index].start, plan.groups[index].stop) for index in ids]
            member = torch.repeat_interleave(torch.arange(len(ids)), sizes)
            rows = slice(start, start + count)
            self._types.append(_TypeRows(quant_type, rows, torch.tensor(ids), sizes, member))
            start += count
        self.components = torch.cat(components)

    def quantise(self, coefficients: torch.Tensor) -> QuantisedSection:
        """Quantise the coefficients of some tokens; each token's result depends on that token alone.

        Parameters
        ----------
        coefficients : torch.Tensor
            Floating ``[stored, tokens]``, rows as in `components`.

        Raises
        ------
        EncodeRangeError
            If a coefficient is NaN or infinite, or a shift or scale too large for float16.
        """
        tokens = coefficients.shape[1]
        side = torch.empty((2 * self.num_groups, tokens), dtype=torch.float16)
        shifts, scales = side[: self.num_groups], side[self.num_groups :]
        symbols = {quant_type: torch.empty((0, tokens), dtype=torch.uint8) for quant_type in STORED_TYPES}
        for part in self._types:
            c = coefficients[part.rows].float()
            shift, scale = _side_data(part.type, part.reduce(c, "amin"), part.reduce(c, "amax"), part.mean(c))
            shifts[part.groups], scales[part.groups] = shift, scale
            symbols[part.type] = _to_symbols(part.type, c, part.spread(shift), part.spread(scale))
        _check_finite(shifts, scales)
        return QuantisedSection(side, symbols)

    def dequantise(self, section: QuantisedSection, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the coefficients behind the symbols: `dtype` ``[stored, tokens]``, as `quantise` takes.

        They are computed in float32 and then rounded to `dtype`.
        """
        shifts, scales = section.side[: self.num_groups], section.side[self.num_groups :]
        result = torch.empty((self.components.numel(), section.side.shape[1]), dtype=dtype)
        for part in self._types:
            result[part.rows] = _to_values(
                part.type,
                section.symbols[part.type],
                part.spread(shifts[part.groups]),
                part.spread(scales[part.groups]),
            )
        return result


@dataclass(frozen=True, eq=False)
class _TypeRows:
    """The groups of one type: which rows of the coefficients and of the side data are theirs."""

    type: QuantType
    rows: slice
    groups: torch.Tensor  # int64 [groups of the type]: rows of shifts and scales
    sizes: torch.Tensor  # int64 [groups of the type]
    member: torch.Tensor  # int64 [components of the type]: which of these groups each belongs to

    def reduce(self, c: torch.Tensor, operation: str) -> torch.Tensor:
        """Reduce float32 ``[components, tokens]`` to ``[groups, tokens]``."""
        result = c.new_empty((self.groups.numel(), c.shape[1]))
        index = self.member[:, None].expand_as(c)
        return result.scatter_reduce_(0, index, c, operation, include_self=False)

    def mean(self, c: torch.Tensor) -> torch.Tensor | None:
        if self.type is not QuantType.FP8:
            return None
        total = torch.zeros((self.groups.numel(), c.shape[1]), dtype=torch.float64)
        return total.index_add_(0, self.member, c.double()) / self.sizes[:, None]

    def spread(self, side: torch.Tensor) -> torch.Tensor:
        """Repeat ``[groups, tokens]`` for each component of its group, as float32."""
        return side.float().index_select(0, self.member)


def _side_data(
    quant_type: QuantType, low: torch.Tensor, high: torch.Tensor, mean: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float16 shifts and scales from float32 minima and maxima, and float64 means for FP8."""
    if mean is None:
        return low.half() + 0.0, _ceil_float16((high - low) / (2**quant_type.bits - 1))
    shift = mean.float().half() + 0.0
    center = shift.float()
    return shift, _ceil_float16(torch.maximum(high - center, center - low) / E4M3_MAX)


def _to_symbols(
    quant_type: QuantType, c: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    # Dividing by infinity where the scale is 0 gives the symbol 0 without a branch.
    scaled = (c - shift).div_(scale.masked_fill(scale == 0, torch.inf))
    if quant_type is QuantType.FP8:
        return float_to_e4m3(scaled)
    return scaled.round_().clamp_(0, 2**quant_type.bits - 1).to(torch.uint8)


def _to_values(
    quant_type: QuantType, symbols: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    numbers = e4m3_to_float(symbols) if quant_type is QuantType.FP8 else symbols.float()
    return numbers.mul_(scale).add_(shift)


def float_to_e4m3(numbers: torch.Tensor) -> torch.Tensor:
    """Round float32 of any shape to uint8 bit patterns of E4M3FN, saturating; -0 becomes 0."""
    # Older versions of torch do not saturate when they convert.
    saturated = numbers.clamp(-E4M3_MAX, E4M3_MAX).add_(0.0)
    return saturated.to(torch.float8_e4m3fn).view(torch.uint8)


def e4m3_to_float(patterns: torch.Tensor) -> torch.Tensor:
    """Return uint8 E4M3FN bit patterns of any shape (no NaN among them) as float32 numbers.

    Moving the bits into a float16 scales the number by 2**-8, subnormal numbers included; several times
    faster on a CPU than the conversion from torch's own float8 type.
    """
    bits = patterns.to(torch.int16)
    half = ((bits & 0x7F) << 7) | ((bits & 0x80) << 8)
    return half.view(torch.float16).float().mul_(256.0)


def _ceil_float16(x: torch.Tensor) -> torch.Tensor:
    """Round float32 that is not negative up to float16; beyond the largest float16 to infinity."""
    half = x.half() + 0.0
    too_small = half.float() < x
    return (half.view(torch.int16) + too_small.to(torch.int16)).view(torch.float16)


def _check_finite(shift: torch.Tensor, scale: torch.Tensor) -> None:
    if not (torch.isfinite(shift).all() and torch.isfinite(scale).all()):
        raise EncodeRangeError(
            "the KV holds NaN or infinity, or coefficients beyond float16's range; keep this block raw, "
            "and recalibrate if it happens often"
        )
