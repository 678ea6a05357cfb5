"""Symbols beyond their class to an unordered list, sorted afterwards (`rd_side_data`); they are few.

CPU reference: `rd_packing.pack`, its indices and values.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["list_escapes"]


@triton.jit
def list_escapes(
    beyond,  # [rows, tokens]: which symbols of a tile to list
    symbol,  # int32 [rows, tokens]
    row,  # int32 [rows], counted through all classes
    token,  # int32 [tokens], within the tier block
    num_tokens,  # int32, of the tier block: one or [tokens]
    block,  # int32, tier block: one or [tokens]
    counts,  # int32 [tier blocks]
    indices,  # int32 [tier blocks, capacity]
    values,
    capacity,
):
    """Append what is beyond; the count goes on where the list is full."""
    if tl.sum(beyond.to(tl.int32)) > 0:
        one = tl.full(symbol.shape, 1, dtype=tl.int32)
        owner = block + tl.zeros_like(token)
        place = tl.atomic_add(counts + owner[None, :] + (one - 1), one, mask=beyond)
        listed = beyond & (place < capacity)
        at = (owner * capacity)[None, :] + place
        index = row[:, None] * (num_tokens + tl.zeros_like(token))[None, :] + token[None, :]
        tl.store(indices + at, index, mask=listed)
        tl.store(values + at, symbol, mask=listed)
