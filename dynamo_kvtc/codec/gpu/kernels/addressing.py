"""Where channels and layers lie in a paged cache, told so that Triton can move 16 bytes at a time.

A number that was loaded tells the compiler nothing about contiguity or alignment; where the host has checked
both (`PagedSide.vector`), channels are counted instead of loaded, and pointers are declared aligned.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["channel_offsets", "layer_pointer"]


@triton.jit
def channel_offsets(
    channels,  # int32 [2, HALF]
    stride_channel,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Return the offsets in a head, in elements, of the first and second members of the pairs."""
    half = tl.arange(0, BLOCK_HALF)
    if VECTOR:
        first, second = half, HALF + half
    else:
        in_half = half < HALF
        first = tl.load(channels + half, mask=in_half, other=0).to(tl.int64) * stride_channel
        second = tl.load(channels + HALF + half, mask=in_half, other=0).to(tl.int64) * stride_channel
    return first, second


@triton.jit
def layer_pointer(address, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """Return the pointer to the view whose address is stored at `address`."""
    base = tl.load(address).to(tl.pointer_type(DTYPE))
    if VECTOR:
        base = tl.multiple_of(base, 16)
    return base
