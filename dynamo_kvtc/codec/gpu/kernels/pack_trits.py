"""Five ternary symbols to a byte: the packing that the projection's tiles cannot do.

CPU reference: `rd_rows.pack_rows`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.gpu.sections import Sections

__all__ = ["pack_trits"]

_BLOCK_R, _BLOCK_B = 32, 64


@triton.jit
def _trits_kernel(
    trits,  # int8 [rows, columns]
    sections,  # int64 [tier blocks, 3]
    payload,
    num_rows,
    num_columns,
    most_bytes,
    num_blocks,
    wide,
    byte,
    nibble,
    BLOCK_R: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    row_tiles, byte_tiles = tl.cdiv(num_rows, BLOCK_R), tl.cdiv(most_bytes, BLOCK_B)
    for tile in range(tl.program_id(0), row_tiles * byte_tiles * num_blocks, tl.num_programs(0)):
        section = sections + tile // (row_tiles * byte_tiles) * 3
        first, num_tokens, start = tl.load(section), tl.load(section + 1), tl.load(section + 2)
        row = (tile // byte_tiles % row_tiles * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
        at = tile % byte_tiles * BLOCK_B + tl.arange(0, BLOCK_B)
        packed = tl.zeros((BLOCK_R, BLOCK_B), dtype=tl.int32)
        for back in range(5):
            token = at * 5 + 4 - back
            symbol = tl.load(
                trits + row[:, None] * num_columns + first + token[None, :],
                mask=(row < num_rows)[:, None] & (token < num_tokens)[None, :],
                other=0,
            ).to(tl.int32)
            packed = packed * 3 + tl.where(symbol < 0, symbol + 3, symbol)
        row_bytes = (num_tokens + 4) // 5
        start += (2 * wide + byte) * num_tokens + nibble * ((num_tokens + 1) // 2)
        tl.store(
            payload + start + row[:, None] * row_bytes + at[None, :],
            packed.to(tl.uint8),
            mask=(row < num_rows)[:, None] & (at < row_bytes)[None, :],
        )


def pack_trits(
    gpu: GpuDevice,
    trits: torch.Tensor,
    counts: tuple[int, ...],
    sections: Sections,
    payload: torch.Tensor,
) -> None:
    """Pack int8 symbols ``[trit rows, tokens]`` into their places in `payload`."""
    rows, columns = trits.shape
    if not rows or not columns:
        return
    most_bytes = -(-sections.most_tokens // 5)
    block_b = gpu.tile(most_bytes, _BLOCK_B)
    blocks = len(sections.counts)
    tiles = triton.cdiv(rows, _BLOCK_R) * triton.cdiv(most_bytes, block_b) * blocks
    wide, byte, nibble, _ = counts
    _trits_kernel[gpu.grid(tiles, gpu.STREAMING)](
        trits, sections.table, payload, rows, columns, most_bytes, blocks, wide, byte, nibble,
        BLOCK_R=_BLOCK_R, BLOCK_B=block_b, num_warps=4,
    )  # fmt: skip
