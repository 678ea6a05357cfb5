"""Side data of the rd profile: number of escapes, levels and escapes, right in front of the symbols.

Its size depends on the number of escapes, which only the device knows; it ends where the symbols begin, so
a payload is contiguous whatever that number is. CPU reference: `rd_packing.pack`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.gpu.sections import Sections

__all__ = ["write_side_data"]

_BLOCK = 1024


@triton.jit
def _side_kernel(
    levels,  # int32 [columns], from 0 to 15
    escape_counts,  # int32 [tier blocks]
    escape_indices,  # int32 [tier blocks, capacity], ascending
    escape_values,
    sections,
    payload,
    capacity,
    num_blocks,
    BLOCK: tl.constexpr,
):
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        section = sections + block * 3
        first, num_tokens = tl.load(section), tl.load(section + 1)
        count = tl.minimum(tl.load(escape_counts + block), capacity)
        level_bytes = (num_tokens + 1) // 2
        side = payload + tl.load(section + 2) - (4 + level_bytes + 6 * count)
        quarter = tl.arange(0, 4)
        tl.store(side + quarter, ((count >> (8 * quarter)) & 255).to(tl.uint8))
        for at in range(0, level_bytes.to(tl.int32), BLOCK):
            place = at + tl.arange(0, BLOCK)
            low = tl.load(levels + first + 2 * place, mask=2 * place < num_tokens, other=0)
            high = tl.load(levels + first + 2 * place + 1, mask=2 * place + 1 < num_tokens, other=0)
            tl.store(side + 4 + place, (low | (high << 4)).to(tl.uint8), mask=place < level_bytes)
        table = side + 4 + level_bytes
        index, value = escape_indices + block * capacity, escape_values + block * capacity
        for at in range(0, count, BLOCK):
            place = at + tl.arange(0, BLOCK)
            listed = place < count
            before = tl.load(index + place - 1, mask=listed & (place > 0), other=-1)
            gap = tl.load(index + place, mask=listed, other=0) - before - 1
            number = tl.load(value + place, mask=listed, other=0)
            zigzag = tl.where(number < 0, -2 * number - 1, 2 * number)
            tl.store(table + place, (gap & 255).to(tl.uint8), mask=listed)
            tl.store(table + count + place, (zigzag & 255).to(tl.uint8), mask=listed)
            for plane in range(1, 4):
                part = (gap >> (8 * plane)) & 255
                tl.store(table + (plane + 1) * count + place, part.to(tl.uint8), mask=listed)
            tl.store(table + 5 * count + place, ((zigzag >> 8) & 255).to(tl.uint8), mask=listed)


def write_side_data(
    gpu: GpuDevice,
    levels: torch.Tensor,
    escapes: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    sections: Sections,
    payload: torch.Tensor,
) -> None:
    """Sort the escapes and write the side data of a batch.

    Parameters
    ----------
    levels : torch.Tensor
        int32 ``[tokens]``, 0 to 15.
    escapes : tuple of torch.Tensor
        As `project_symbols` leaves them: int32 counts, and indices and values in any order.
    payload : torch.Tensor
        uint8, written up to where `sections` say that the symbols begin.
    """
    counts, indices, values = escapes
    capacity = indices.shape[1]
    if capacity:
        place = torch.arange(capacity, dtype=torch.int32, device=indices.device)
        unused = place[None, :] >= counts[:, None]
        ordered, order = indices.masked_fill(unused, torch.iinfo(torch.int32).max).sort(dim=1)
        indices, values = ordered, values.gather(1, order)
    blocks = len(sections.counts)
    _side_kernel[gpu.grid(blocks, gpu.STREAMING)](
        levels, counts, indices, values, sections.table, payload, capacity, blocks,
        BLOCK=gpu.tile(sections.most_tokens, _BLOCK), num_warps=4,
    )  # fmt: skip
