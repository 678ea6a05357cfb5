"""Many small copies in one launch: chunks between payloads, aligned slots and stream images.

CPU reference: slicing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from dynamo_kvtc.codec.gpu.device import GpuDevice

__all__ = ["copy_ranges"]

_BLOCK = 4096


@triton.jit
def _copy_kernel(source, target, ranges, most_bytes, num_ranges, BLOCK: tl.constexpr):
    pieces = tl.cdiv(most_bytes, BLOCK)
    for tile in range(tl.program_id(0), pieces * num_ranges, tl.num_programs(0)):
        entry = ranges + tile // pieces * 3
        start, to, size = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
        at = tile % pieces * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        tl.store(target + to + at, tl.load(source + start + at, mask=inside, other=0), mask=inside)


def copy_ranges(
    gpu: GpuDevice, source: torch.Tensor, target: torch.Tensor, ranges: Sequence[tuple[int, int, int]]
) -> None:
    """Copy ``(from, to, bytes)`` ranges of one uint8 tensor to another; targets do not overlap."""
    wanted = [entry for entry in ranges if entry[2]]
    if not wanted:
        return
    most = max(size for _, _, size in wanted)
    block = gpu.tile(most, _BLOCK)
    table = gpu.upload(torch.tensor(wanted, dtype=torch.int64))
    tiles = triton.cdiv(most, block) * len(wanted)
    _copy_kernel[gpu.grid(tiles, gpu.STREAMING)](
        source, target, table, most, len(wanted), BLOCK=block, num_warps=4
    )
