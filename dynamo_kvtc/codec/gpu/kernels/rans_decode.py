"""rANS chunks to plain bytes: one warp a chunk, a step of 32 bytes at a time.

The work of a step is a chain: the entry of the state's low bits, the new state, which lanes take a word, the
word. Chunks are many; nothing else hides the chain's time. Whatever a chunk's bytes are, only its own stored
bytes are read and its own plain bytes written.

CPU reference: `rans_reference.decode`, `RansCoder.decode`.
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
    TOTAL_BITS,
    ballot,
    load_word,
    popcount,
)
from dynamo_kvtc.codec.gpu.kernels.rans_read_table import SLOT_WORDS, fill_slots, read_table

__all__ = ["END", "TABLES", "decode_chunks"]

#: Bits of faults: segments, tables or first states that no encoder writes; words that run out or are left
#: over, or states that do not end where they began.
TABLES, END = 1, 2

_LANES = tl.constexpr(LANES)
_SEGMENTS = tl.constexpr(MAX_SEGMENTS)
_STATE_BYTES = tl.constexpr(STATE_BYTES)
_SLOT_WORDS = tl.constexpr(SLOT_WORDS)
_BITS = tl.constexpr(TOTAL_BITS)
_SLOTS = tl.constexpr(1 << TOTAL_BITS)
_TABLES = tl.constexpr(TABLES)
_END = tl.constexpr(END)


@triton.jit(do_not_specialize=["num_chunks"])
def _decode_kernel(
    data,
    plain,
    chunks,  # int64 [chunks, 4]: first stored byte, stored bytes, first plain byte, plain bytes
    workspace,  # int32 [programs, SLOT_WORDS]
    faults,  # int32 [chunks]
    num_chunks,
):
    lane = tl.arange(0, _LANES)
    bit = tl.full((_LANES,), 1, dtype=tl.uint32) << lane.to(tl.uint32)
    behind = bit - 1
    table = workspace + tl.program_id(0).to(tl.int64) * _SLOT_WORDS
    for chunk in range(tl.program_id(0), num_chunks, tl.num_programs(0)):
        entry = chunks + chunk * 4
        source, out = data + tl.load(entry), plain + tl.load(entry + 2)
        stored, size = tl.load(entry + 1).to(tl.int32), tl.load(entry + 3).to(tl.int32)
        steps = (size + _LANES - 1) // _LANES
        head = load_word(source, 0, stored >= 2)
        segments = head & 0xFF
        bad = ((head >> 8) != 0) | (segments < 1) | (segments > _SEGMENTS) | (stored % 2 == 1)
        part = tl.arange(0, _SEGMENTS)
        in_lengths = (part < segments - 1) & (2 * part + 4 <= stored)
        lengths = load_word(source, 2 + 2 * part, in_lengths)
        bad = bad | (tl.sum((in_lengths & (lengths == 0)).to(tl.int32), 0) > 0)
        bad = bad | (tl.sum(lengths, 0) >= steps)
        # Tables come before states: their sizes first.
        broken = bad.to(tl.int32)
        at = 2 * segments
        for _ in range(tl.where(broken == 0, segments, 0)):
            _frequency, _before, _rank, at, wrong = read_table(source, at, stored)
            broken = broken | wrong
        fits = (broken == 0) & (at + _STATE_BYTES <= stored)
        place = at + 4 * lane
        lower = load_word(source, place, place < tl.where(fits, stored, 0))
        upper = load_word(source, place + 2, place < tl.where(fits, stored, 0))
        states = lower.to(tl.uint32) | upper.to(tl.uint32) << 16
        fits = fits & (tl.sum((upper == 0).to(tl.int32), 0) == 0)
        # Words come in pairs, at multiples of 4 bytes: of the first pair, half may belong to the states.
        begin = tl.where(fits, at + _STATE_BYTES, 0)
        pairs = (source + begin // 4 * 4).to(tl.pointer_type(tl.uint32))
        num_words = tl.where(fits, (stored - begin // 4 * 4) // 2, 0)
        # What a step takes lies in one load of a pair a lane; that of the next 32 words is under way.
        base, passed = 0, begin % 4 // 2
        pair = tl.load(pairs + lane, mask=2 * lane < num_words, other=0)
        first = 0
        at = 2 * segments
        for segment in range(tl.where(fits, segments, 0)):
            frequency, before, rank, at, _wrong = read_table(source, at, stored)
            fill_slots(table, frequency, before, rank)
            own = tl.sum(tl.where(part == segment, lengths, 0), 0)
            last = tl.where(segment == segments - 1, steps, first + own)
            step = first
            while step < last:
                ahead = base + _LANES // 2 + lane
                coming = tl.load(pairs + ahead, mask=2 * ahead < num_words, other=0)
                while (step < last) & (passed < _LANES):
                    slot = (states & (_SLOTS - 1)).to(tl.int32)
                    found = tl.load(table + slot).to(tl.uint32, bitcast=True)
                    inside = step * _LANES + lane < size
                    high = states >> _BITS
                    moved = (found >> 20) * high + high + ((found >> 8) & (_SLOTS - 1))
                    moved = tl.where(inside, moved, states)
                    short = moved < 65536
                    wanting = ballot(short, bit)
                    at_word = passed + popcount(wanting & behind).to(tl.int32)
                    word = tl.gather(pair, at_word >> 1, 0) << (((at_word & 1) ^ 1) << 4).to(tl.uint32)
                    states = tl.where(short, moved << 16 | word >> 16, moved)
                    passed += popcount(wanting).to(tl.int32)
                    tl.store(out + step * _LANES + lane, found.to(tl.uint8), mask=inside)
                    step += 1
                if passed >= _LANES:
                    passed -= _LANES
                    base += _LANES // 2
                    pair = coming
            first = last
        ended = (2 * base + passed == num_words) & (tl.sum((states != 65536).to(tl.int32), 0) == 0)
        wrong_end = fits & (ended == 0)
        tl.store(faults + chunk, tl.where(fits, tl.where(wrong_end, _END, 0), _TABLES))


def decode_chunks(
    gpu: GpuDevice,
    data: torch.Tensor,
    plain: torch.Tensor,
    chunks: torch.Tensor,
    faults: torch.Tensor,
) -> None:
    """Decode a batch.

    Parameters
    ----------
    data, plain : torch.Tensor
        uint8: stored bytes are read, plain ones written.
    chunks : torch.Tensor
        int64 ``[chunks, 4]``: first stored byte (a multiple of 16; bytes up to the next multiple of it behind
        the last one may be read as well), stored bytes, first plain byte, plain bytes.
    faults : torch.Tensor
        int32 ``[chunks]``, written: 0, or what is wrong with a chunk.
    """
    count = chunks.shape[0]
    grid = gpu.grid(count, gpu.STREAMING)
    with gpu.workspace(4 * SLOT_WORDS * grid[0]) as workspace:
        _decode_kernel[grid](
            data, plain, chunks, workspace.view(torch.int32), faults, count, num_warps=1, num_stages=1
        )
