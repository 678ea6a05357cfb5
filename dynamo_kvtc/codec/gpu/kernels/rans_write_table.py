"""Counts of bytes to frequency tables: levels chosen, tables packed, and what the rANS encoder multiplies by.

One program a segment, all in integers, so that the tables are the CPU's.

CPU reference: `rans_tables.choose_levels`, `rans_tables.pack_table`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.gpu.kernels.rans_lanes import SYMBOLS, TOTAL_BITS
from dynamo_kvtc.codec.gpu.kernels.rans_read_table import WEIGHTS, spread

__all__ = ["CODE_WORDS", "TABLE_BYTES", "write_tables"]

#: Words (int32) of a segment's codes: for each symbol, frequency and the sum of those before it (13 and 12
#: bits), and 2^32 over the frequency.
CODE_WORDS = 2 * SYMBOLS

#: Bytes of the place of a packed table.
TABLE_BYTES = 2 + 32 + 128

_SYMBOLS = tl.constexpr(SYMBOLS)
_CODE_WORDS = tl.constexpr(CODE_WORDS)
_TABLE_BYTES = tl.constexpr(TABLE_BYTES)
_TOTAL = tl.constexpr(1 << TOTAL_BITS)
_WEIGHTS = tl.constexpr(WEIGHTS)
_SCALES = tl.constexpr((32768, 36945, 41654, 46963))


@triton.jit
def log2_of(frequency):
    """Return 2^12 times the logarithm of 1 to 4,096, to .01 (int64)."""
    exponent = frequency * 0
    for power in tl.static_range(1, 13):
        exponent += (frequency >= 2**power).to(tl.int32)
    rest = (((frequency << 12) >> exponent) - 4096).to(tl.int64)
    return (exponent << 12) + rest + ((rest * (4096 - rest) * 1407) >> 24)


@triton.jit
def choose_levels(counts):
    """Return the level of each symbol (int32 ``[256]``): 0 where it does not occur, else 1 to 15."""
    occurs = (counts > 0).to(tl.int32)
    wide = counts.to(tl.int64)
    total = tl.sum(wide, 0)
    # Constants stand behind tensors: the interpreter of Triton 3.7 makes constants of their products.
    spare = tl.maximum(tl.max(wide, 0) * _TOTAL - total, total // 2)
    share = (wide * _TOTAL) * (wide * _TOTAL)
    best = occurs
    most = total * 0 - 1
    for scale in tl.static_range(4):
        level = occurs
        reached = total
        for known in tl.static_range(2, 16):
            further = total + ((spare * (_WEIGHTS[known] * _SCALES[scale])) >> 24)
            level += occurs * (share > reached * further).to(tl.int32)
            reached = further
        frequency, _before, _total = spread(level, occurs)
        gain = tl.sum(wide * log2_of(tl.maximum(frequency, 1)), 0)
        best = tl.where(gain > most, level, best)
        most = tl.maximum(gain, most)
    return best


@triton.jit(do_not_specialize=["num_segments"])
def _tables_kernel(
    counts,  # int32 [segments, 256]
    codes,  # int32 [segments, CODE_WORDS]
    tables,  # uint8 [segments, TABLE_BYTES]
    sizes,  # int32 [segments]
    num_segments,
):
    symbol = tl.arange(0, _SYMBOLS)
    row = tl.arange(0, 16)
    byte = tl.arange(0, _SYMBOLS // 2)
    for segment in range(tl.program_id(0), num_segments, tl.num_programs(0)):
        code, out = codes + segment * _CODE_WORDS, tables + segment * _TABLE_BYTES
        level = choose_levels(tl.load(counts + segment * _SYMBOLS + symbol))
        occurs = (level > 0).to(tl.int32)
        frequency, before, _total = spread(level, occurs)
        masks = tl.sum(tl.reshape(occurs << (symbol % 16), (16, 16)), 1)
        in_row = (masks > 0).to(tl.int32)
        rows = tl.sum(in_row << row, 0)
        place = 2 + 2 * (tl.cumsum(in_row, 0) - in_row)
        tl.store(out, rows.to(tl.uint8))
        tl.store(out + 1, (rows >> 8).to(tl.uint8))
        tl.store(out + place, masks.to(tl.uint8), mask=in_row == 1)
        tl.store(out + place + 1, (masks >> 8).to(tl.uint8), mask=in_row == 1)
        # Levels in the order of their symbols, then two to a byte.
        rank = tl.cumsum(occurs, 0) - occurs
        count = tl.sum(occurs, 0)
        start = 2 + 2 * tl.sum(in_row, 0)
        size = start + (count + 1) // 2
        tl.store(code + rank, level, mask=occurs == 1)
        tl.debug_barrier()
        low = tl.load(code + 2 * byte, mask=2 * byte < count, other=0)
        high = tl.load(code + 2 * byte + 1, mask=2 * byte + 1 < count, other=0)
        tl.store(out + start + byte, (low | high << 4).to(tl.uint8), mask=2 * byte < count)
        tl.store(out + size, tl.zeros((), dtype=tl.uint8), mask=size % 2 == 1)
        tl.store(sizes + segment, size + size % 2)
        tl.debug_barrier()
        tl.store(code + symbol, frequency | before << 13)
        divisor = tl.maximum(frequency, 1).to(tl.uint32)
        reciprocal = tl.full((_SYMBOLS,), 0xFFFFFFFF, dtype=tl.uint32) // divisor
        tl.store(code + _SYMBOLS + symbol, reciprocal.to(tl.int32, bitcast=True))


def write_tables(gpu: GpuDevice, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make the tables of segments that have a byte at least.

    Parameters
    ----------
    counts : torch.Tensor
        int32 ``[segments, 256]``.

    Returns
    -------
    tuple
        Codes, int32 ``[segments, CODE_WORDS]``; packed tables, uint8 ``[segments, TABLE_BYTES]``; and their
        sizes, int32 ``[segments]``.
    """
    count = counts.shape[0]
    codes = counts.new_empty((count, CODE_WORDS))
    tables = torch.empty((count, TABLE_BYTES), dtype=torch.uint8, device=counts.device)
    sizes = counts.new_empty(count)
    _tables_kernel[gpu.grid(count, gpu.STREAMING)](counts, codes, tables, sizes, count, num_warps=1)
    return codes, tables, sizes
