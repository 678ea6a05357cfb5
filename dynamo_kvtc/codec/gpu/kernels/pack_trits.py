"""Five ternary symbols to a byte, in the epilogue of the projection.

A byte is ``sum(digit[i] * 3**i)``: exactly what tensor cores make of a tile of digits and a matrix of powers
of 3, wherever in the tile a byte's tokens lie (`TritTiles`); sums in registers would need five to divide a
power of two. Each symbol takes `BLOCK_T` / 4 more multiplications, where its coefficient took a row's
elements: thousands.

CPU reference: `rd_rows.pack_rows`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dynamo_kvtc.codec.gpu.kernels.escapes import list_escapes

__all__ = ["add_trits", "store_trits"]


@triton.jit
def add_trits(
    packed,  # float32 [BLOCK_R, BYTES]: bytes of the tile so far
    symbol,  # int32 [BLOCK_R, tokens]
    in_rows,  # [BLOCK_R]
    first_row,  # of the tile, counted through all classes
    block,  # int32 [tokens]: tier block
    token,  # int32 [tokens]: within the tier block
    num_tokens,  # int32 [tokens]: of the tier block
    byte,  # int32 [tokens]: within the tile
    in_tokens,
    escape_counts,
    escape_indices,
    escape_values,
    capacity,
    BLOCK_R: tl.constexpr,
    BYTES: tl.constexpr,
):
    """Return `packed` with the symbols of some tokens added, those beyond the class clamped and listed."""
    clamped = tl.minimum(tl.maximum(symbol, -1), 1)
    beyond = in_rows[:, None] & in_tokens[None, :] & (clamped != symbol)
    list_escapes(
        beyond, symbol, first_row + tl.arange(0, BLOCK_R), token, num_tokens, block, escape_counts,
        escape_indices, escape_values, capacity,
    )  # fmt: skip
    place = token % 5
    power = tl.where(place == 0, 1, tl.where(place == 1, 3, tl.where(place == 2, 9, 27)))
    power = tl.where(place == 4, 81, power)
    belongs = in_tokens[:, None] & (byte[:, None] == tl.arange(0, BYTES)[None, :])
    powers = tl.where(belongs, power[:, None], 0)
    digit = tl.where(clamped < 0, 2, clamped)
    # Up to 242, in float16 operands and float32 sums: exact.
    return tl.dot(digit.to(tl.float16), powers.to(tl.float16), packed)


@triton.jit
def store_trits(
    packed,  # float32 [BLOCK_R, BYTES]
    in_rows,
    first_row,  # of the tile, counted through the ternary rows
    first_byte,  # of the tile
    stop_byte,
    trit_bytes,  # int32 [bytes, 2]: tier block, byte within it
    sections,  # int64 [tier blocks, 3]
    payload,
    wide,
    byte,
    nibble,
    BLOCK_R: tl.constexpr,
    BYTES: tl.constexpr,
):
    """Store a tile of bytes, each where its tier block has its ternary region."""
    at = first_byte + tl.arange(0, BYTES)
    inside = at < stop_byte
    section = sections + tl.load(trit_bytes + 2 * at, mask=inside, other=0) * 3
    num_tokens = tl.load(section + 1, mask=inside, other=0)
    start = tl.load(section + 2, mask=inside, other=0) + tl.load(
        trit_bytes + 2 * at + 1, mask=inside, other=0
    )
    start += (2 * wide + byte) * num_tokens + nibble * ((num_tokens + 1) // 2)
    row_bytes = ((num_tokens + 4) // 5).to(tl.int32)
    offset = (first_row + tl.arange(0, BLOCK_R))[:, None] * row_bytes[None, :]
    target = payload + start[None, :] + offset
    tl.store(target, packed.to(tl.int32).to(tl.uint8), mask=in_rows[:, None] & inside[None, :])
