"""What the rANS kernels share: the shape of a chunk, and sums over the lanes of a warp.

A chunk is coded by one warp, whose lane `i` codes bytes `i`, `i + 32`, … (`docs/bitstream.md`, section 4.1).
Kernels are compiled once, for any number of chunks: 1 and multiples of 16 make no kernels of their own.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["LANES", "MAX_SEGMENTS", "STATE_BYTES", "SYMBOLS", "TOTAL_BITS", "ballot", "load_word", "popcount"]

#: Lanes of a chunk: threads of a warp.
LANES = 32

#: Values of a byte.
SYMBOLS = 256

#: Frequencies of a table add up to two to this power.
TOTAL_BITS = 12

#: Parts of a chunk with a table of their own.
MAX_SEGMENTS = 16

#: Bytes of a chunk's states.
STATE_BYTES = 4 * LANES


@triton.jit
def popcount(bits):
    """Return how many bits are set, uint32; the compiler knows this sum and makes it one instruction."""
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    return (((bits + (bits >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24


@triton.jit
def ballot(wanted, bit):
    """Return a word (uint32) with the bit of each lane that wants; a sum over a warp is one instruction."""
    return tl.sum(tl.where(wanted, bit, 0), 0)


@triton.jit
def load_word(base, at, mask):
    """Load 16 bits, little-endian, as int32; 0 where masked."""
    low = tl.load(base + at, mask=mask, other=0).to(tl.int32)
    return low | tl.load(base + at + 1, mask=mask, other=0).to(tl.int32) << 8
