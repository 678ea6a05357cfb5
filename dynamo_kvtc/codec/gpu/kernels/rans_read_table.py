"""Frequency tables of rANS chunks: read, checked, and turned into entries that a state's low bits choose.

CPU reference: `rans_tables.read_table`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dynamo_kvtc.codec.gpu.kernels.rans_lanes import SYMBOLS, TOTAL_BITS, load_word, popcount

__all__ = ["SLOT_WORDS", "WEIGHTS", "fill_slots", "read_table", "spread"]

#: Words (int32) of a program's workspace: an entry for each slot, and one for each symbol that occurs.
SLOT_WORDS = (1 << TOTAL_BITS) + SYMBOLS

#: Weight of each level; 0 stands for symbols that do not occur.
WEIGHTS = (0, 0, 1, 2, 3, 4, 7, 11, 18, 29, 46, 75, 121, 196, 317, 512)

_SYMBOLS = tl.constexpr(SYMBOLS)
_TOTAL = tl.constexpr(1 << TOTAL_BITS)
_WEIGHTS = tl.constexpr(WEIGHTS)
_BLOCK = tl.constexpr(512)


@triton.jit
def weight_of(level):
    """Return the weights of levels (int32, any shape); 0 for 0."""
    weight = level * 0
    for known in tl.static_range(2, 16):
        weight = tl.where(level == known, _WEIGHTS[known], weight)
    return weight


@triton.jit
def read_table(source, at, stored):
    """Read the table at byte `at` of a chunk of `stored` bytes; nothing behind them is touched.

    Returns
    -------
    tuple
        For each of 256 symbols (int32) its frequency, the sum of those before it, and how many occur before
        it; the byte behind the table; and 1 if it is no table, else 0.
    """
    symbol = tl.arange(0, _SYMBOLS)
    row = symbol // 16
    rows = load_word(source, at, at + 2 <= stored)
    in_row = (rows >> row) & 1
    place = at + 2 + 2 * popcount((rows & ((1 << row) - 1)).to(tl.uint32)).to(tl.int32)
    mask = load_word(source, place, (in_row == 1) & (place + 2 <= stored))
    bad = tl.sum(((in_row == 1) & (mask == 0)).to(tl.int32), 0)
    occurs = (mask >> (symbol % 16)) & in_row
    used = occurs == 1
    rank = tl.cumsum(occurs, 0) - occurs
    count = tl.sum(occurs, 0)
    levels = at + 2 + 2 * popcount(rows.to(tl.uint32)).to(tl.int32)
    place = levels + rank // 2
    pair = tl.load(source + place, mask=used & (place < stored), other=0).to(tl.int32)
    level = tl.where(used, (pair >> (4 * (rank % 2))) & 15, 0)
    bad += tl.sum((used & (level == 0)).to(tl.int32), 0)
    stop = levels + (count + 1) // 2
    end = stop + (stop - at) % 2
    odd = tl.load(source + stop - 1, mask=(count % 2 == 1) & (stop <= stored), other=0).to(tl.int32)
    pad = tl.load(source + stop, mask=(end != stop) & (end <= stored), other=0).to(tl.int32)
    frequency, before, total = spread(level, occurs)
    bad += ((odd >> 4) != 0).to(tl.int32) + (pad != 0).to(tl.int32)
    bad += (end > stored).to(tl.int32) + (total == 0).to(tl.int32)
    return frequency, before, rank, end, (bad > 0).to(tl.int32)


@triton.jit
def spread(level, occurs):
    """Return what levels make of the slots.

    Parameters
    ----------
    level, occurs : int32 [256]
        Level of each symbol, and 1 where it occurs; both 0 where it does not.

    Returns
    -------
    tuple
        Frequencies and the sums of those before (int32 ``[256]``), and the sum of all weights: where that is
        0, the levels are no table.
    """
    weight = weight_of(level)
    total = tl.sum(weight, 0)
    count, weights = tl.cumsum(occurs, 0), tl.cumsum(weight, 0)
    room, divisor = -(tl.sum(occurs, 0) - _TOTAL), tl.maximum(total, 1)
    after = count + weights * room // divisor
    before = count - occurs + (weights - weight) * room // divisor
    return after - before, before, total


@triton.jit
def fill_slots(table, frequency, before, rank):
    """Write the entries of a sound table: symbol, the slot less the symbol's first one, frequency less 1.

    `table` is int32 ``[SLOT_WORDS]``; an entry has 8, 12 and 12 bits. The warp's earlier loads from it are
    done, and its later ones see what is written here.
    """
    symbol = tl.arange(0, _SYMBOLS)
    slot = tl.arange(0, _BLOCK)
    used = frequency > 0
    tl.debug_barrier()
    for first in range(0, _TOTAL, _BLOCK):
        tl.store(table + first + slot, tl.zeros((_BLOCK,), dtype=tl.int32))
    tl.store(table + _TOTAL + rank, symbol | before << 8 | (frequency - 1) << 20, mask=used)
    tl.debug_barrier()
    # A symbol begins where there is a 1: ones up to a slot count the symbols up to it.
    tl.store(table + before, tl.full((_SYMBOLS,), 1, dtype=tl.int32), mask=used)
    tl.debug_barrier()
    passed = 0
    for first in range(0, _TOTAL, _BLOCK):
        begins = tl.load(table + first + slot)
        own = tl.load(table + _TOTAL + passed + tl.cumsum(begins, 0) - 1)
        passed += tl.sum(begins, 0)
        start = (own >> 8) & (_TOTAL - 1)
        tl.store(table + first + slot, (own ^ start << 8) | (first + slot - start) << 8)
    tl.debug_barrier()
