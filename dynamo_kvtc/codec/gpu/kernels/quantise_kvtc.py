"""Coefficients to side data and packed symbols, for the kvtc profile: the epilogue of `project_kvtc`.

Bit-exact with the CPU from the same coefficients; the mean is summed in float64 in another order, which shows
in float16 once in 10^9 or so.

CPU reference: `PlanQuantiser.quantise`, `packing.pack`.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["quantise_units"]


@triton.jit
def round_half_even(x):
    """Round float32 of magnitude below 2^22; adding 1.5 * 2^23 leaves no bits behind the point."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def ceil_float16(x):
    """Round float32 that is not negative up to float16."""
    half = x.to(tl.float16)
    bits = half.to(tl.int16, bitcast=True) + (half.to(tl.float32) < x).to(tl.int16)
    return bits.to(tl.float16, bitcast=True)


@triton.jit
def to_e4m3(x):
    """Round float32 to E4M3 patterns (int32), half to even, saturating."""
    magnitude = tl.minimum(tl.abs(x), 448.0)
    bits = magnitude.to(tl.int32, bitcast=True)
    # Three of 23 bits of mantissa stay; a carry goes into the exponent, whose bias falls from 127 to 7.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    subnormal = round_half_even(magnitude * 512.0).to(tl.int32)
    pattern = tl.where(magnitude < 0.015625, subnormal, normal)
    return tl.where(x < 0, pattern | 0x80, pattern)


@triton.jit
def shift_and_scale(low, high, mean, BITS: tl.constexpr):
    """Return float16 shift and scale of groups from minima, maxima and (8 bits) means in float32."""
    if BITS == 8:
        shift = mean.to(tl.float16)
        centre = shift.to(tl.float32)
        scale = ceil_float16(
            tl.div_rn(tl.maximum(high - centre, centre - low), tl.full(low.shape, 448.0, tl.float32))
        )
    else:
        shift = low.to(tl.float16)
        scale = ceil_float16(tl.div_rn(high - low, tl.full(low.shape, 2**BITS - 1, tl.float32)))
    # No negative zeros.
    return tl.where(shift == 0.0, tl.zeros(shift.shape, dtype=tl.float16), shift), scale


@triton.jit
def store_side(
    shift,  # float16 [groups, BLOCK_T]
    scale,
    group,  # int32 [groups]: group of the plan
    in_groups,
    token,
    in_tokens,
    num_tokens,
    out,
    plan_groups,
):
    """Store shifts and scales of whole groups: high bytes of all groups of the plan, then low ones."""
    mask = in_groups[:, None] & in_tokens[None, :]
    plane = 2 * plan_groups * num_tokens
    shift_bits = shift.to(tl.int16, bitcast=True).to(tl.int32)
    scale_bits = scale.to(tl.int16, bitcast=True).to(tl.int32)
    side = out + group[:, None] * num_tokens + token[None, :]
    other = side + plan_groups * num_tokens
    tl.store(side, ((shift_bits >> 8) & 255).to(tl.uint8), mask=mask)
    tl.store(side + plane, (shift_bits & 255).to(tl.uint8), mask=mask)
    tl.store(other, ((scale_bits >> 8) & 255).to(tl.uint8), mask=mask)
    tl.store(other + plane, (scale_bits & 255).to(tl.uint8), mask=mask)


@triton.jit
def store_symbols(
    c,  # float32 [BLOCK_R, BLOCK_T]
    shift,  # float32, of the shape of c or [1, BLOCK_T]
    scale,
    line,  # int32 [BLOCK_R]: among rows of the type
    in_rows,
    in_tokens,
    region,  # where symbols of the type begin
    first_byte,  # of the tile in a row
    row_bytes,
    BITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Quantise and pack rows."""
    PER: tl.constexpr = 8 // BITS
    # Dividing by infinity where the scale is 0 gives the symbol 0.
    divisor = tl.where(scale == 0.0, float("inf"), scale)
    scaled = tl.div_rn(c - shift, tl.broadcast_to(divisor, (BLOCK_R, BLOCK_T)))
    if BITS == 8:
        packed = to_e4m3(scaled)
    else:
        symbol = round_half_even(tl.minimum(tl.maximum(scaled, 0.0), 2.0**BITS - 1.0)).to(tl.int32)
        symbol = tl.where(in_rows[:, None] & in_tokens[None, :], symbol, 0)
        parts = tl.reshape(symbol, (BLOCK_R, BLOCK_T // PER, PER))
        packed = tl.sum(parts << (BITS * tl.arange(0, PER))[None, None, :], axis=2)
    at = first_byte + tl.arange(0, BLOCK_T // PER)
    target = region + line.to(tl.int64)[:, None] * row_bytes + at[None, :]
    tl.store(target, packed.to(tl.uint8), mask=in_rows[:, None] & (at < row_bytes)[None, :])


@triton.jit
def quantise_units(
    coefficients,  # float32 [rows of the panel, .]: of its first row and the tile's first token
    stride,
    first_row,  # of the panel
    units,  # int32 [units, 4]: group of the plan, first row, rows, whether each row is a group
    first_unit,
    unit_stop,
    token,  # int32 [BLOCK_T], within the tier block
    num_tokens,
    out,  # the tier block's payload
    status,  # of the tier block
    plan_groups,
    count8,
    count4,
    BITS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Write what becomes of the groups of one type in a panel, for the tokens of a tile.

    WHOLE says that there are coefficients of 0 behind the last token, so that loads need no mask that would
    cut them into single elements.
    """
    PER: tl.constexpr = 8 // BITS
    in_tokens = token < num_tokens
    lane = tl.arange(0, BLOCK_R)
    column = coefficients + tl.arange(0, BLOCK_T)[None, :]
    row_bytes = (num_tokens + PER - 1) // PER
    first_byte = tl.min(token) // PER
    region, type_row = out + 4 * plan_groups * num_tokens, 0
    if BITS < 8:
        region += count8 * num_tokens
        type_row += count8
    if BITS < 4:
        region += count4 * ((num_tokens + 1) // 2)
        type_row += count4
    for unit in range(first_unit, unit_stop):
        group, first = tl.load(units + 4 * unit), tl.load(units + 4 * unit + 1)
        size = tl.load(units + 4 * unit + 2)
        source = column + (first - first_row) * stride
        if tl.load(units + 4 * unit + 3) != 0:
            # Groups of one component: as many at once as a tile has rows.
            in_rows = lane < size
            mask = in_rows[:, None] & in_tokens[None, :]
            wanted = in_rows[:, None] if WHOLE else mask
            one = tl.load(source + lane[:, None] * stride, mask=wanted, other=0.0)
            shift, scale = shift_and_scale(one, one, one, BITS)
            shift32, scale32 = shift.to(tl.float32), scale.to(tl.float32)
            broken = mask & ((one - one) + (shift32 - shift32) + (scale32 - scale32) != 0.0)
            tl.store(status, 1, mask=tl.sum(broken.to(tl.int32)) > 0)
            store_side(shift, scale, group + lane, in_rows, token, in_tokens, num_tokens, out, plan_groups)
            store_symbols(
                one, shift32, scale32, first - type_row + lane, in_rows, in_tokens, region, first_byte,
                row_bytes, BITS, BLOCK_R, BLOCK_T,
            )  # fmt: skip
        else:
            # Row by row of a tile, and over its rows at the end, which takes barriers.
            low = tl.full((BLOCK_R, BLOCK_T), float("inf"), dtype=tl.float32)
            high = -low
            total = tl.zeros((BLOCK_R, BLOCK_T), dtype=tl.float64 if BITS == 8 else tl.float32)
            odd = tl.zeros((BLOCK_R, BLOCK_T), dtype=tl.float32)
            for step in range(0, size, BLOCK_R):
                seen = (step + lane < size)[:, None]
                c = tl.load(
                    source + (step + lane)[:, None] * stride,
                    mask=seen if WHOLE else seen & in_tokens[None, :],
                    other=0.0,
                )
                # NaN may get lost in a minimum; this sum keeps it, and infinity.
                odd += c - c
                low = tl.minimum(low, tl.where(seen, c, float("inf")))
                high = tl.maximum(high, tl.where(seen, c, float("-inf")))
                if BITS == 8:
                    total += c.to(tl.float64)
            lowest, highest = tl.min(low, axis=0)[None, :], tl.max(high, axis=0)[None, :]
            mean = (tl.sum(total, axis=0) / size.to(total.dtype)).to(tl.float32)[None, :]
            wrong = tl.sum(odd, axis=0)[None, :]
            group_shift, group_scale = shift_and_scale(lowest, highest, mean, BITS)
            centre, width = group_shift.to(tl.float32), group_scale.to(tl.float32)
            unsound = in_tokens[None, :] & (wrong + (centre - centre) + (width - width) != 0.0)
            tl.store(status, 1, mask=tl.sum(unsound.to(tl.int32)) > 0)
            only = tl.arange(0, 1)
            store_side(
                group_shift,
                group_scale,
                group + only,
                only == 0,
                token,
                in_tokens,
                num_tokens,
                out,
                plan_groups,
            )
            for step in range(0, size, BLOCK_R):
                present = step + lane < size
                again = tl.load(
                    source + (step + lane)[:, None] * stride,
                    mask=present[:, None] if WHOLE else present[:, None] & in_tokens[None, :],
                    other=0.0,
                )
                store_symbols(
                    again, centre, width, first - type_row + step + lane, present, in_tokens, region,
                    first_byte, row_bytes, BITS, BLOCK_R, BLOCK_T,
                )  # fmt: skip
