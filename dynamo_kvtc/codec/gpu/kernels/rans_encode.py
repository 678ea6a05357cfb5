"""Plain bytes to rANS chunks: one warp a chunk, from its last step of 32 bytes to its first.

Words go to the end of the chunk's slot, from behind; what comes before them in the chunk is written in front
of the first of them, so nothing is moved. A slot has the plain size: a chunk that does not fit has not shrunk
and is stored as it is. A state is divided by multiplication: the quotient's error is at most 1.

CPU reference: `rans_reference.encode`, `RansCoder.encode_many`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.gpu.kernels.rans_lanes import (
    LANES,
    MAX_SEGMENTS,
    STATE_BYTES,
    SYMBOLS,
    TOTAL_BITS,
    ballot,
    popcount,
)
from dynamo_kvtc.codec.gpu.kernels.rans_write_table import CODE_WORDS, TABLE_BYTES

__all__ = ["encode_chunks"]

_LANES = tl.constexpr(LANES)
_SEGMENTS = tl.constexpr(MAX_SEGMENTS)
_STATE_BYTES = tl.constexpr(STATE_BYTES)
_SYMBOLS = tl.constexpr(SYMBOLS)
_TOTAL = tl.constexpr(1 << TOTAL_BITS)
_FULL_BITS = tl.constexpr(32 - TOTAL_BITS)
_CODE_WORDS = tl.constexpr(CODE_WORDS)
_TABLE_BYTES = tl.constexpr(TABLE_BYTES)


@triton.jit
def _load_symbol(source, step, first, lane, size):
    """Load the bytes of a step (int32), 0 before step `first` and behind the end."""
    at = step * _LANES + lane
    return tl.load(source + at, mask=(at >= first * _LANES) & (at < size), other=0).to(tl.int32)


@triton.jit
def _encode_step(states, position, words, found, reciprocal, inside, bit):
    """Code a byte of each lane that is inside.

    Parameters
    ----------
    states : uint32 [32]
        States before.
    position : int32
        Where the word lies that was written last; those of this step go before it.
    found, reciprocal : int32 [32]
        What stands for the bytes; see `CODE_WORDS`.

    Returns
    -------
    tuple
        States and position behind it.
    """
    frequency = (found & 8191).to(tl.uint32)
    full = inside & ((states >> _FULL_BITS) >= frequency)
    giving = ballot(full, bit)
    position -= popcount(giving).to(tl.int32)
    at = position + popcount(giving & (bit - 1)).to(tl.int32)
    tl.store(words + at, states.to(tl.uint16), mask=full & (at >= 0))
    states = tl.where(full, states >> 16, states)
    quotient = tl.umulhi(states, reciprocal.to(tl.uint32, bitcast=True))
    quotient += (states - quotient * frequency >= frequency).to(tl.uint32)
    moved = states + quotient * (_TOTAL - frequency) + (found >> 13).to(tl.uint32)
    return tl.where(inside, moved, states), position


@triton.jit(do_not_specialize=["num_chunks"])
def _encode_kernel(
    plain,
    chunks,  # int64 [chunks, 5]: first plain byte, plain bytes, slot's first byte, first segment, segments
    steps,  # int32 [segments]
    codes,  # int32 [segments, CODE_WORDS]
    tables,  # uint8 [segments, TABLE_BYTES]
    table_sizes,  # int32 [segments]
    coded,
    sizes,  # int32 [chunks]
    num_chunks,
):
    lane = tl.arange(0, _LANES)
    part = tl.arange(0, _SEGMENTS)
    byte = tl.arange(0, _SYMBOLS)
    bit = tl.full((_LANES,), 1, dtype=tl.uint32) << lane.to(tl.uint32)
    for chunk in range(tl.program_id(0), num_chunks, tl.num_programs(0)):
        entry = chunks + chunk * 5
        source, size = plain + tl.load(entry), tl.load(entry + 1).to(tl.int32)
        slot = coded + tl.load(entry + 2)
        begin, segments = tl.load(entry + 3), tl.load(entry + 4).to(tl.int32)
        words = slot.to(tl.pointer_type(tl.uint16))
        end = (size + 15) // 16 * 8
        position = end
        states = tl.full((_LANES,), 65536, dtype=tl.uint32)
        last = (size + _LANES - 1) // _LANES
        head = 2 * segments + _STATE_BYTES
        for back in range(segments):
            segment = begin + segments - 1 - back
            own = tl.load(steps + segment)
            head += tl.load(table_sizes + segment)
            code = codes + segment * _CODE_WORDS
            first = last - own
            # Four steps at a time, whose bytes were loaded while the four before them were coded.
            symbol0 = _load_symbol(source, last - 1, first, lane, size)
            symbol1 = _load_symbol(source, last - 2, first, lane, size)
            symbol2 = _load_symbol(source, last - 3, first, lane, size)
            symbol3 = _load_symbol(source, last - 4, first, lane, size)
            for four in range((own + 3) // 4):
                step = last - 1 - 4 * four
                found0, reciprocal0 = tl.load(code + symbol0), tl.load(code + _SYMBOLS + symbol0)
                found1, reciprocal1 = tl.load(code + symbol1), tl.load(code + _SYMBOLS + symbol1)
                found2, reciprocal2 = tl.load(code + symbol2), tl.load(code + _SYMBOLS + symbol2)
                found3, reciprocal3 = tl.load(code + symbol3), tl.load(code + _SYMBOLS + symbol3)
                symbol0 = _load_symbol(source, step - 4, first, lane, size)
                symbol1 = _load_symbol(source, step - 5, first, lane, size)
                symbol2 = _load_symbol(source, step - 6, first, lane, size)
                symbol3 = _load_symbol(source, step - 7, first, lane, size)
                left = tl.where(step * _LANES + lane < size, step + 1 - first, 0)
                states, position = _encode_step(states, position, words, found0, reciprocal0, left > 0, bit)
                # Only the chunk's last step may have lanes without a byte.
                left = step + 1 - first + lane * 0
                states, position = _encode_step(states, position, words, found1, reciprocal1, left > 1, bit)
                states, position = _encode_step(states, position, words, found2, reciprocal2, left > 2, bit)
                states, position = _encode_step(states, position, words, found3, reciprocal3, left > 3, bit)
            last = first
        whole = head + 2 * (end - position)
        tl.store(sizes + chunk, whole)
        if whole < size:
            at = 2 * position - _STATE_BYTES
            place = (slot + at + 4 * lane).to(tl.pointer_type(tl.uint16))
            tl.store(place, states.to(tl.uint16))
            tl.store(place + 1, (states >> 16).to(tl.uint16))
            for back in range(segments):
                segment = begin + segments - 1 - back
                table_size = tl.load(table_sizes + segment)
                at -= table_size
                of_table = byte < table_size
                table = tl.load(tables + segment * _TABLE_BYTES + byte, mask=of_table, other=0)
                tl.store(slot + at + byte, table, mask=of_table)
            front = (slot + at - 2 * segments).to(tl.pointer_type(tl.uint16))
            lengths = tl.load(steps + begin + part, mask=part < segments - 1, other=0)
            tl.store(front, segments.to(tl.uint16))
            tl.store(front + 1 + part, lengths.to(tl.uint16), mask=part < segments - 1)


def encode_chunks(
    gpu: GpuDevice,
    plain: torch.Tensor,
    chunks: torch.Tensor,
    steps: torch.Tensor,
    written: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    coded: torch.Tensor,
) -> torch.Tensor:
    """Encode a batch.

    Parameters
    ----------
    plain : torch.Tensor
        uint8.
    chunks : torch.Tensor
        int64 ``[chunks, 5]``: first plain byte, plain bytes (1 to 65,536), first byte of the slot (a multiple
        of 16; the slot has the plain bytes, rounded up to one), first segment, segments (1 to 16).
    steps : torch.Tensor
        int32 ``[segments]``: steps of each, whose sum over a chunk is that of the chunk.
    written : tuple of torch.Tensor
        What `write_tables` has made of the segments.
    coded : torch.Tensor
        uint8: slots, written where a chunk shrinks. It then ends with its slot.

    Returns
    -------
    torch.Tensor
        int32 ``[chunks]``: coded bytes; where these are no fewer than the plain ones, the slot holds nothing.
    """
    count = chunks.shape[0]
    sizes = torch.empty(count, dtype=torch.int32, device=plain.device)
    codes, tables, table_sizes = written
    _encode_kernel[gpu.grid(count, gpu.STREAMING)](
        plain, chunks, steps, codes, tables, table_sizes, coded, sizes, count, num_warps=1, num_stages=1
    )
    return sizes
