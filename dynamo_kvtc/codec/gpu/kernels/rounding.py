"""Rounding that gives the same bits everywhere: on every GPU, and in Triton's interpreter."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["to_bfloat16", "to_cache"]


@triton.jit
def to_bfloat16(x):
    """Round float32 to bfloat16, half to even; Triton's interpreter truncates in its own conversion."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def to_cache(x, BF16: tl.constexpr, FP16: tl.constexpr):
    """Round float32 to the dtype of a cache: bfloat16, float16, or as it is."""
    if BF16:
        return to_bfloat16(x)
    elif FP16:
        return x.to(tl.float16)
    else:
        return x
