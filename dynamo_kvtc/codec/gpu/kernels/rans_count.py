"""How often each byte occurs in each segment of a batch: what the rANS encoder's tables are made from.

CPU reference: `numpy.bincount`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.gpu.kernels.rans_lanes import SYMBOLS

__all__ = ["count_bytes"]

_BLOCK = 4096

_SYMBOLS = tl.constexpr(SYMBOLS)


@triton.jit(do_not_specialize=["most_bytes", "num_segments"])
def _count_kernel(plain, segments, counts, most_bytes, num_segments, BLOCK: tl.constexpr):
    pieces = tl.cdiv(most_bytes, BLOCK)
    symbol = tl.arange(0, _SYMBOLS)
    for tile in range(tl.program_id(0), pieces * num_segments, tl.num_programs(0)):
        segment = tile // pieces
        start, size = tl.load(segments + segment * 2), tl.load(segments + segment * 2 + 1)
        at = tile % pieces * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        found = tl.histogram(tl.load(plain + start + at, mask=inside, other=0).to(tl.int32), _SYMBOLS)
        # What lies behind the end has been counted as zeros.
        found -= tl.where(symbol == 0, BLOCK - tl.sum(inside.to(tl.int32), 0), 0)
        tl.atomic_add(counts + segment * _SYMBOLS + symbol, found, mask=found > 0, sem="relaxed")


def count_bytes(gpu: GpuDevice, plain: torch.Tensor, segments: torch.Tensor, most_bytes: int) -> torch.Tensor:
    """Count bytes.

    Parameters
    ----------
    plain : torch.Tensor
        uint8.
    segments : torch.Tensor
        int64 ``[segments, 2]``: first byte and bytes.
    most_bytes : int
        Bytes of the largest segment.

    Returns
    -------
    torch.Tensor
        int32 ``[segments, 256]``.
    """
    count = segments.shape[0]
    counts = torch.zeros((count, SYMBOLS), dtype=torch.int32, device=plain.device)
    block = gpu.tile(most_bytes, _BLOCK)
    tiles = triton.cdiv(most_bytes, block) * count
    _count_kernel[gpu.grid(tiles, gpu.STREAMING)](
        plain, segments, counts, most_bytes, count, BLOCK=block, num_warps=4
    )
    return counts
