"""Coefficients to side data and packed symbols, for the kvtc profile: one program per group of components.

A kernel of its own, not the projection's epilogue: a group has up to 1,024 components, and its minimum,
maximum or mean must be known before its first symbol. Bit-exact with the CPU from the same coefficients;
the mean is summed in float64 in another order, which shows in float16 once in 10^9 or so.

CPU reference: `PlanQuantiser.quantise`, `packing.pack`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.gpu.kvtc_tables import KvtcTables
from dynamo_kvtc.codec.gpu.sections import Sections

__all__ = ["quantise_groups"]

_BLOCK_T, _BLOCK_R = 64, 16


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
def _quantise_kernel(
    coefficients,  # float32 [stored, columns]
    groups,  # int32 [groups of the type, 3]: group of the plan, first row, rows
    sections,  # int64 [tier blocks, 3]
    payload,
    status,
    num_groups,  # of the type
    num_columns,
    num_blocks,
    most_tokens,
    plan_groups,
    first_row,  # of the type
    count8,
    count4,
    BITS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    PER: tl.constexpr = 8 // BITS
    tiles_t = tl.cdiv(most_tokens, BLOCK_T)
    for tile in range(tl.program_id(0), num_groups * tiles_t * num_blocks, tl.num_programs(0)):
        group = groups + tile // (tiles_t * num_blocks) * 3
        plan_group, first, size = tl.load(group), tl.load(group + 1), tl.load(group + 2)
        block = tile // tiles_t % num_blocks
        section = sections + block * 3
        start, num_tokens = tl.load(section), tl.load(section + 1)
        out = payload + tl.load(section + 2)
        token = tile % tiles_t * BLOCK_T + tl.arange(0, BLOCK_T)
        in_tokens = token < num_tokens
        column = coefficients + start + token
        low = tl.full((BLOCK_T,), float("inf"), dtype=tl.float32)
        high = -low
        total = tl.zeros((BLOCK_T,), dtype=tl.float64)
        odd = tl.zeros((BLOCK_T,), dtype=tl.float32)
        for step in range(tl.cdiv(size, BLOCK_R)):
            row = step * BLOCK_R + tl.arange(0, BLOCK_R)
            mask = (row < size)[:, None] & in_tokens[None, :]
            source = column[None, :] + (first + row).to(tl.int64)[:, None] * num_columns
            c = tl.load(source, mask=mask, other=0.0)
            # NaN may get lost in a minimum; this sum keeps it, and infinity.
            odd += tl.sum(tl.where(mask, c - c, 0.0), axis=0)
            low = tl.minimum(low, tl.min(tl.where(mask, c, float("inf")), axis=0))
            high = tl.maximum(high, tl.max(tl.where(mask, c, float("-inf")), axis=0))
            if BITS == 8:
                total += tl.sum(tl.where(mask, c, 0.0).to(tl.float64), axis=0)
        if BITS == 8:
            shift = (total / size.to(tl.float64)).to(tl.float32).to(tl.float16)
            centre = shift.to(tl.float32)
            scale = ceil_float16(tl.div_rn(tl.maximum(high - centre, centre - low), 448.0))
        else:
            shift = low.to(tl.float16)
            scale = ceil_float16(tl.div_rn(high - low, tl.full((BLOCK_T,), 2**BITS - 1, dtype=tl.float32)))
        # No negative zeros.
        shift = tl.where(shift == 0.0, tl.zeros((BLOCK_T,), dtype=tl.float16), shift)
        shift32, scale32 = shift.to(tl.float32), scale.to(tl.float32)
        sound = (odd == 0.0) & (shift32 - shift32 == 0.0) & (scale32 - scale32 == 0.0)
        broken = in_tokens & (sound == 0)
        tl.store(status + block, 1, mask=tl.sum(broken.to(tl.int32)) > 0)
        plane = 2 * plan_groups * num_tokens
        shift_bits = shift.to(tl.int16, bitcast=True).to(tl.int32)
        scale_bits = scale.to(tl.int16, bitcast=True).to(tl.int32)
        side = out + plan_group * num_tokens + token
        other = side + plan_groups * num_tokens
        tl.store(side, ((shift_bits >> 8) & 255).to(tl.uint8), mask=in_tokens)
        tl.store(side + plane, (shift_bits & 255).to(tl.uint8), mask=in_tokens)
        tl.store(other, ((scale_bits >> 8) & 255).to(tl.uint8), mask=in_tokens)
        tl.store(other + plane, (scale_bits & 255).to(tl.uint8), mask=in_tokens)
        # Dividing by infinity where the scale is 0 gives the symbol 0.
        divisor = tl.where(scale32 == 0.0, float("inf"), scale32)
        row_bytes = (num_tokens + PER - 1) // PER
        region = out + 2 * plane
        if BITS < 8:
            region += count8 * num_tokens
        if BITS < 4:
            region += count4 * ((num_tokens + 1) // 2)
        at = tile % tiles_t * (BLOCK_T // PER) + tl.arange(0, BLOCK_T // PER)
        for step in range(tl.cdiv(size, BLOCK_R)):
            row = step * BLOCK_R + tl.arange(0, BLOCK_R)
            mask = (row < size)[:, None] & in_tokens[None, :]
            source = column[None, :] + (first + row).to(tl.int64)[:, None] * num_columns
            c = tl.load(source, mask=mask, other=0.0)
            scaled = tl.div_rn(c - shift32[None, :], tl.broadcast_to(divisor[None, :], (BLOCK_R, BLOCK_T)))
            if BITS == 8:
                packed = to_e4m3(scaled)
            else:
                top = 2.0**BITS - 1.0
                symbol = round_half_even(tl.minimum(tl.maximum(scaled, 0.0), top)).to(tl.int32)
                symbol = tl.where(mask, symbol, 0)
                parts = tl.reshape(symbol, (BLOCK_R, BLOCK_T // PER, PER))
                packed = tl.sum(parts << (BITS * tl.arange(0, PER))[None, None, :], axis=2)
            line = (first - first_row + row).to(tl.int64)[:, None] * row_bytes
            tl.store(
                region + line + at[None, :],
                packed.to(tl.uint8),
                mask=(row < size)[:, None] & (at < row_bytes)[None, :],
            )


def quantise_groups(
    gpu: GpuDevice,
    coefficients: torch.Tensor,
    tables: KvtcTables,
    sections: Sections,
    payload: torch.Tensor,
    status: torch.Tensor,
) -> None:
    """Write the payloads of a batch.

    Parameters
    ----------
    coefficients : torch.Tensor
        float32 ``[stored, tokens]``, rows as in `PlanQuantiser.components`.
    tables : KvtcTables
        The plan.
    sections : Sections
        Tier blocks, and where their payloads go.
    payload : torch.Tensor
        uint8, written.
    status : torch.Tensor
        int32 ``[tier blocks]``; set to 1 where a shift or scale is no finite float16.
    """
    blocks = len(sections.counts)
    block_t = gpu.tile(sections.most_tokens, _BLOCK_T)
    for part in tables.types:
        tiles = part.groups.shape[0] * triton.cdiv(sections.most_tokens, block_t) * blocks
        if not tiles:
            continue
        _quantise_kernel[gpu.grid(tiles, gpu.STREAMING)](
            coefficients, part.groups, sections.table, payload, status, part.groups.shape[0],
            sections.columns, blocks, sections.most_tokens, tables.num_groups, part.first_row,
            tables.counts[0], tables.counts[1],
            BITS=part.bits, BLOCK_T=block_t, BLOCK_R=_BLOCK_R, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
