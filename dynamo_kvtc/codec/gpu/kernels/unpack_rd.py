"""Payloads of the rd profile to coefficients, in bfloat16, one token's together as products want them.

One kernel for all symbols, then one for the few escapes, which overwrite their clamped symbols. Everything
that `docs/bitstream.md`, section 7.2, forbids sets a bit of `dynamo_kvtc.codec.gpu.faults`.

CPU reference: `rd_packing.unpack`, `RdQuantiser.dequantise`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.gpu.faults import COUNT, ESCAPE, PADDING, VALUE
from dynamo_kvtc.codec.gpu.kernels.rounding import to_bfloat16
from dynamo_kvtc.codec.gpu.sections import RowTiles, Sections

__all__ = ["UNPACK_ROWS", "unpack_symbols"]

#: Rows of a tile: 64 bytes of a token's coefficients are written together.
UNPACK_ROWS = 32

_BLOCK_T, _BLOCK_E = 32, 512

_COUNT = tl.constexpr(COUNT)
_ESCAPE = tl.constexpr(ESCAPE)
_PADDING = tl.constexpr(PADDING)
_VALUE = tl.constexpr(VALUE)


@triton.jit
def read_tile(payload, kind, row, token, mask, tokens, wide, byte, nibble):
    """Do what `read_symbol` does for a tile ``[rows, tokens]`` of one class; `row` counts in the class.

    All int32, and no arithmetic but the class's own: a section has fewer bytes than 2^31.

    Returns
    -------
    tuple
        Symbols (int32), and bits of faults (int32).
    """
    half_start = (2 * wide + byte) * tokens
    is_last = mask & (token == tokens - 1)[None, :]
    # Each branch has names of its own: Triton wants one type for a name.
    if kind == 0:
        high_at = payload + row[:, None] * tokens + token[None, :]
        high = tl.load(high_at, mask=mask, other=0).to(tl.int8, bitcast=True).to(tl.int32)
        low = tl.load(high_at + wide * tokens, mask=mask, other=0).to(tl.int8, bitcast=True).to(tl.int32)
        # Two's complement: the largest symbols have a high byte that wraps.
        words = high * 256 + low
        words = tl.where(words < -32768, words + 65536, words)
        symbol = words
        faults = tl.where(mask & (words == -32768), _VALUE, 0)
    elif kind == 1:
        byte_at = payload + (2 * wide + row)[:, None] * tokens + token[None, :]
        single = tl.load(byte_at, mask=mask, other=0).to(tl.int8, bitcast=True).to(tl.int32)
        symbol = single
        faults = tl.where(mask & (single == -128), _VALUE, 0)
    elif kind == 2:
        half_at = payload + half_start + row[:, None] * ((tokens + 1) // 2) + (token // 2)[None, :]
        halves = tl.load(half_at, mask=mask, other=0).to(tl.int32)
        # Sign extension of four bits.
        digit = (((halves >> (4 * (token % 2))[None, :]) & 15) ^ 8) - 8
        symbol = digit
        padded = is_last & (token % 2 == 0)[None, :] & ((halves >> 4) != 0)
        faults = tl.where(mask & (digit == -8), _VALUE, 0) | tl.where(padded, _PADDING, 0)
    else:
        fifth_start = half_start + nibble * ((tokens + 1) // 2)
        fifth_at = payload + fifth_start + row[:, None] * ((tokens + 4) // 5) + (token // 5)[None, :]
        fifths = tl.load(fifth_at, mask=mask, other=0).to(tl.int32)
        # Dividing by a power of 3 is multiplying by its reciprocal in 16 bits: exact below 256.
        power = token % 5
        reciprocal = tl.where(power == 0, 65536, tl.where(power == 1, 21846, 7282))
        reciprocal = tl.where(power == 3, 2428, tl.where(power == 4, 810, reciprocal))
        rest = (fifths * reciprocal[None, :]) >> 16
        next_trits = (rest * 21846) >> 16
        trit = rest - 3 * next_trits
        symbol = tl.where(trit == 2, -1, trit)
        behind = is_last & (power != 4)[None, :] & (next_trits != 0)
        faults = tl.where(mask & (fifths > 242), _VALUE, 0) | tl.where(behind, _PADDING, 0)
    return symbol, faults


@triton.jit
def read_symbol(payload, row, token, mask, num_tokens, wide, byte, nibble):
    """Return the symbols (int32) at rows and tokens of any shape, and 1 where a byte is none of an encoder's.

    `payload` points at the first symbol; `num_tokens` is int64.
    """
    row = row.to(tl.int64)
    is_wide = row < wide
    is_byte = (row >= wide) & (row < wide + byte)
    is_nibble = (row >= wide + byte) & (row < wide + byte + nibble)
    is_trit = row >= wide + byte + nibble
    whole = (row + tl.where(is_byte, wide, 0)) * num_tokens + token
    half_start = (2 * wide + byte) * num_tokens
    half = half_start + (row - wide - byte) * ((num_tokens + 1) // 2) + token // 2
    fifth_start = half_start + nibble * ((num_tokens + 1) // 2)
    fifth = fifth_start + (row - wide - byte - nibble) * ((num_tokens + 4) // 5) + token // 5
    at = tl.where(is_trit, fifth, tl.where(is_nibble, half, whole))
    code = tl.load(payload + at, mask=mask, other=0).to(tl.int32)
    low = tl.load(payload + at + wide * num_tokens, mask=mask & is_wide, other=0).to(tl.int32)
    signed = tl.where(code > 127, code - 256, code)
    signed_low = tl.where(low > 127, low - 256, low)
    digit = (code >> (4 * (token % 2)).to(tl.int32)) & 15
    power = token % 5
    divisor = tl.where(power == 0, 1, tl.where(power == 1, 3, tl.where(power == 2, 9, 27)))
    divisor = tl.where(power == 4, 81, divisor).to(tl.int32)
    trit = code // divisor % 3
    symbol = tl.where(is_wide, signed * 256 + signed_low, signed)
    symbol = tl.where(is_nibble, tl.where(digit > 7, digit - 16, digit), symbol)
    symbol = tl.where(is_trit, tl.where(trit == 2, -1, trit), symbol)
    # Two's complement: the largest symbols have a high byte that wraps.
    symbol = tl.where(is_wide & (symbol < -32768), symbol + 65536, symbol)
    bad = mask & (
        (is_wide & (symbol == -32768))
        | (is_byte & (symbol == -128))
        | (is_nibble & (symbol == -8))
        | (is_trit & (code > 242))
    )
    is_last = mask & (token == num_tokens - 1)
    next_trits = code // (divisor * 3)
    padded = is_last & (
        (is_nibble & (token % 2 == 0) & ((code >> 4) != 0)) | (is_trit & (power != 4) & (next_trits != 0))
    )
    return symbol, bad, padded


@triton.jit
def read_scale(levels, token, mask, scales):
    """Return the factors of tokens by their importance levels, half a byte each."""
    code = tl.load(levels + token // 2, mask=mask, other=0).to(tl.int32)
    return tl.load(scales + ((code >> (4 * (token % 2)).to(tl.int32)) & 15))


@triton.jit
def dequantise_tile(symbol, first_offset, second_offset, step, scale):
    """Return coefficients; operations as `RdQuantiser.dequantise` orders them."""
    u = symbol.to(tl.float32)
    offset = tl.where(tl.abs(u) > 1.0, second_offset, first_offset)
    sign = tl.where(u > 0.0, 1.0, tl.where(u < 0.0, -1.0, 0.0))
    return (offset * sign + u) * tl.div_rn(step + tl.zeros_like(scale), scale)


@triton.jit
def _report(word, found, BIT: tl.constexpr):
    """Set a bit of a tier block's word if any lane has found it."""
    if tl.sum((found & BIT) // BIT) > 0:
        tl.atomic_or(word, BIT)


@triton.jit
def _symbols_kernel(
    payload,
    sides,  # int64 [tier blocks]: where each one's side data begins in the payload
    scales,  # float32 [16]
    offsets,  # float32 [2, stored]
    row_tiles,
    token_tiles,
    sections,
    coefficients,  # bfloat16 [columns, stride]
    faults,
    step,
    num_row_tiles,
    num_token_tiles,
    stored,
    stride,
    wide,
    byte,
    nibble,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    for tile in range(tl.program_id(0), num_row_tiles * num_token_tiles, tl.num_programs(0)):
        row_tile = row_tiles + tile // num_token_tiles * 3
        kind, first_row, row_stop = tl.load(row_tile), tl.load(row_tile + 1), tl.load(row_tile + 2)
        token_tile = token_tiles + tile % num_token_tiles * 2
        block = tl.load(token_tile)
        token = tl.load(token_tile + 1) + tl.arange(0, BLOCK_T)
        section = sections + block * 3
        num_tokens = tl.load(section + 1).to(tl.int32)
        row = first_row + tl.arange(0, BLOCK_R)
        in_rows, in_tokens = row < row_stop, token < num_tokens
        mask = in_rows[:, None] & in_tokens[None, :]
        before = tl.where(kind == 0, 0, tl.where(kind == 1, wide, wide + byte))
        before = tl.where(kind == 3, wide + byte + nibble, before)
        symbol, found = read_tile(
            payload + tl.load(section + 2), kind, row - before, token, mask, num_tokens, wide, byte, nibble
        )
        if tl.max(tl.max(found, axis=1), axis=0) > 0:
            _report(faults + block, found, _VALUE)
            _report(faults + block, found, _PADDING)
        scale = read_scale(payload + tl.load(sides + block) + 4, token, in_tokens, scales)
        one = tl.load(offsets + row, mask=in_rows, other=0.0)
        more = tl.load(offsets + stored + row, mask=in_rows, other=0.0)
        value = dequantise_tile(symbol, one[:, None], more[:, None], step, scale[None, :])
        target = coefficients + (tl.load(section) + token)[None, :] * stride + row[:, None]
        tl.store(target, to_bfloat16(value), mask=mask)


@triton.jit
def _escapes_kernel(
    payload,
    sides,
    escape_counts,  # int32 [tier blocks], by the sections' sizes
    scales,
    offsets,
    sections,
    coefficients,
    faults,
    step,
    num_blocks,
    stored,
    stride,
    wide,
    byte,
    nibble,
    BLOCK_E: tl.constexpr,
):
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        section = sections + block * 3
        first, num_tokens, symbols = tl.load(section), tl.load(section + 1), tl.load(section + 2)
        side = payload + tl.load(sides + block)
        count = tl.load(escape_counts + block)
        quarter = tl.arange(0, 4)
        stated = tl.sum(tl.load(side + quarter).to(tl.int64) << (8 * quarter).to(tl.int64))
        if stated != count:
            tl.atomic_or(faults + block, _COUNT)
        level_bytes = (num_tokens + 1) // 2
        last = tl.load(side + 4 + level_bytes - 1).to(tl.int32)
        if (num_tokens % 2 == 1) & ((last >> 4) != 0):
            tl.atomic_or(faults + block, _PADDING)
        table = side + 4 + level_bytes
        before = first * 0 - 1
        for at in range(0, count, BLOCK_E):
            place = at + tl.arange(0, BLOCK_E)
            listed = place < count
            gap = tl.load(table + place, mask=listed, other=0).to(tl.int64)
            for plane in range(1, 4):
                part = tl.load(table + (plane + 1) * count + place, mask=listed, other=0).to(tl.int64)
                gap += part << (8 * plane)
            low = tl.load(table + count + place, mask=listed, other=0).to(tl.int32)
            zigzag = low + (tl.load(table + 5 * count + place, mask=listed, other=0).to(tl.int32) << 8)
            value = tl.where(zigzag % 2 == 1, -((zigzag + 1) // 2), zigzag // 2)
            step_up = tl.where(listed, gap + 1, 0)
            index = before + tl.cumsum(step_up, 0)
            before += tl.sum(step_up)
            inside = listed & (index < stored * num_tokens)
            safe = tl.where(inside, index, 0)
            row, token = safe // num_tokens, safe % num_tokens
            symbol, _bad, _padded = read_symbol(
                payload + symbols, row, token, inside, num_tokens, wide, byte, nibble
            )
            narrow = tl.where(row < wide + byte + nibble, 7, 1)
            limit = tl.where(row < wide, 32767, tl.where(row < wide + byte, 127, narrow)).to(tl.int32)
            magnitude = tl.abs(value)
            clamped = tl.minimum(tl.maximum(value, -limit), limit)
            sound = inside & (magnitude > limit) & (magnitude <= 32767) & (clamped == symbol)
            if tl.sum((listed & (sound == 0)).to(tl.int32)) > 0:
                tl.atomic_or(faults + block, _ESCAPE)
            scale = read_scale(side + 4, token, sound, scales)
            one = tl.load(offsets + row, mask=sound, other=0.0)
            more = tl.load(offsets + stored + row, mask=sound, other=0.0)
            number = dequantise_tile(value, one, more, step, scale)
            tl.store(coefficients + (first + token) * stride + row, to_bfloat16(number), mask=sound)


def unpack_symbols(
    gpu: GpuDevice,
    payload: torch.Tensor,
    sides: torch.Tensor,
    escape_counts: torch.Tensor,
    tiles: RowTiles,
    sections: Sections,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    step: float,
    coefficients: torch.Tensor,
    faults: torch.Tensor,
    *,
    any_escapes: bool,
) -> None:
    """Write the coefficients of a batch.

    Parameters
    ----------
    payload : torch.Tensor
        uint8; `sections` say where each tier block's symbols lie.
    sides, escape_counts : torch.Tensor
        int64 and int32 ``[tier blocks]``: where the side data lies, and the number of escapes that the
        section's size gives.
    scales, offsets, step : torch.Tensor, torch.Tensor, float
        float32 ``[16]`` by level, ``[2, stored]``, and the plan's step.
    coefficients : torch.Tensor
        bfloat16 ``[tokens, padded]``, written up to the stored components.
    faults : torch.Tensor
        int32 ``[tier blocks]``, bits of `dynamo_kvtc.codec.gpu.faults` are set.
    any_escapes : bool
        Whether any section has some; in the interpreter an empty tile costs as much as a full one.
    """
    stored, stride = offsets.shape[1], coefficients.shape[1]
    block_t = gpu.tile(sections.most_tokens, _BLOCK_T)
    token_tiles = sections.token_tiles(block_t)
    total = tiles.table.shape[0] * token_tiles.shape[0]
    wide, byte, nibble, _ = tiles.counts
    if total:
        _symbols_kernel[gpu.grid(total, gpu.STREAMING)](
            payload, sides, scales, offsets, tiles.table, token_tiles, sections.table, coefficients, faults,
            step, tiles.table.shape[0], token_tiles.shape[0], stored, stride, wide, byte, nibble,
            BLOCK_R=tiles.block, BLOCK_T=block_t, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    blocks = len(sections.counts)
    if blocks:
        _escapes_kernel[gpu.grid(blocks, gpu.STREAMING)](
            payload, sides, escape_counts, scales, offsets, sections.table, coefficients, faults, step,
            blocks, stored, stride, wide, byte, nibble,
            BLOCK_E=_BLOCK_E if any_escapes else 16, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
