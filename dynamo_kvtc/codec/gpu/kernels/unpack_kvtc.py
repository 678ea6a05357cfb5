"""Payloads of the kvtc profile to coefficients, in bfloat16, one token's together as products want them.

CPU reference: `packing.unpack`, `PlanQuantiser.dequantise`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.gpu.faults import PADDING, VALUE
from dynamo_kvtc.codec.gpu.kernels.rounding import to_bfloat16
from dynamo_kvtc.codec.gpu.kvtc_tables import KvtcTables
from dynamo_kvtc.codec.gpu.sections import Sections

__all__ = ["unpack_groups"]

_BLOCK_R, _BLOCK_T = 32, 64

_PADDING = tl.constexpr(PADDING)
_VALUE = tl.constexpr(VALUE)


@triton.jit
def load_half(high, low, mask):
    """Load float16 from its two bytes, as float32."""
    bits = tl.load(high, mask=mask, other=0).to(tl.int32) << 8 | tl.load(low, mask=mask, other=0).to(tl.int32)
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _unpack_kernel(
    payload,
    members,  # int32 [rows of the type]
    sections,  # int64 [tier blocks, 3]
    coefficients,  # bfloat16 [columns, stride]
    faults,  # int32 [tier blocks]
    num_rows,  # of the type
    num_blocks,
    most_tokens,
    stride,
    plan_groups,
    first_row,
    count8,
    count4,
    BITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    PER: tl.constexpr = 8 // BITS
    tiles_r, tiles_t = tl.cdiv(num_rows, BLOCK_R), tl.cdiv(most_tokens, BLOCK_T)
    for tile in range(tl.program_id(0), tiles_r * tiles_t * num_blocks, tl.num_programs(0)):
        block = tile // (tiles_r * tiles_t)
        section = sections + block * 3
        start, num_tokens = tl.load(section), tl.load(section + 1)
        source = payload + tl.load(section + 2)
        row = tile // tiles_t % tiles_r * BLOCK_R + tl.arange(0, BLOCK_R)
        token = tile % tiles_t * BLOCK_T + tl.arange(0, BLOCK_T)
        in_rows, in_tokens = row < num_rows, token < num_tokens
        mask = in_rows[:, None] & in_tokens[None, :]
        group = tl.load(members + row, mask=in_rows, other=0).to(tl.int64)
        plane = 2 * plan_groups * num_tokens
        side = source + group[:, None] * num_tokens + token[None, :]
        other = side + plan_groups * num_tokens
        shift = load_half(side, side + plane, mask)
        scale = load_half(other, other + plane, mask)
        broken = mask & (((shift - shift == 0.0) & (scale - scale == 0.0)) == 0)
        region = source + 2 * plane
        if BITS < 8:
            region += count8 * num_tokens
        if BITS < 4:
            region += count4 * ((num_tokens + 1) // 2)
        row_bytes = (num_tokens + PER - 1) // PER
        line = region + row.to(tl.int64)[:, None] * row_bytes
        code = tl.load(line + (token // PER)[None, :], mask=mask, other=0).to(tl.int32)
        padded = 0
        if BITS == 8:
            half = (((code & 0x7F) << 7) | ((code & 0x80) << 8)).to(tl.int16).to(tl.float16, bitcast=True)
            number = half.to(tl.float32) * 256.0
            broken = broken | (mask & ((code & 0x7F) == 0x7F))
        else:
            place = (token % PER)[None, :]
            number = ((code >> (BITS * place)) & (2**BITS - 1)).to(tl.float32)
            # Behind the last token's symbol the rest of its byte is padding.
            is_last = mask & (token == num_tokens - 1)[None, :]
            padded = tl.sum((is_last & ((code >> (BITS * (place + 1))) != 0)).to(tl.int32))
        if tl.sum(broken.to(tl.int32)) > 0:
            tl.atomic_or(faults + block, _VALUE)
        if padded > 0:
            tl.atomic_or(faults + block, _PADDING)
        value = number * scale + shift
        target = coefficients + (start + token)[None, :] * stride + first_row + row[:, None]
        tl.store(target, to_bfloat16(value), mask=mask)


def unpack_groups(
    gpu: GpuDevice,
    payload: torch.Tensor,
    tables: KvtcTables,
    sections: Sections,
    coefficients: torch.Tensor,
    faults: torch.Tensor,
) -> None:
    """Write the coefficients of a batch.

    Parameters
    ----------
    payload : torch.Tensor
        uint8; `sections` say where each tier block's lies.
    coefficients : torch.Tensor
        bfloat16 ``[tokens, padded]``, written up to the stored components.
    faults : torch.Tensor
        int32 ``[tier blocks]``, bits of `dynamo_kvtc.codec.gpu.faults` are set.
    """
    blocks = len(sections.counts)
    block_t = gpu.tile(sections.most_tokens, _BLOCK_T)
    for part in tables.types:
        block_r = gpu.tile(part.rows, _BLOCK_R)
        tiles = triton.cdiv(part.rows, block_r) * triton.cdiv(sections.most_tokens, block_t) * blocks
        if not tiles:
            continue
        _unpack_kernel[gpu.grid(tiles, gpu.STREAMING)](
            payload, part.members, sections.table, coefficients, faults, part.rows, blocks,
            sections.most_tokens, coefficients.shape[1], tables.num_groups, part.first_row,
            tables.counts[0], tables.counts[1],
            BITS=part.bits, BLOCK_R=block_r, BLOCK_T=block_t, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
