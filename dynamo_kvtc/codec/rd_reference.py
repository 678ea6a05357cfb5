"""The rd profile once more, slow and obvious: the yardstick of the fast codec.

Plain loops over tokens and symbols, with transforms and importance in float64; the quantiser's operations
are in float32, as the format has them (`docs/bitstream.md`, section 7). From the same coefficients and
levels it makes the same payload as `dynamo_kvtc.codec.rd_packing`, bit for bit.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import torch

from dynamo_kvtc.codec.bitstream import Profile
from dynamo_kvtc.codec.parameters import RdSideParameters
from dynamo_kvtc.codec.rd_plan import RdPlan
from dynamo_kvtc.codec.reference import ReferenceCodec
from dynamo_kvtc.codec.reference_steps import Array
from dynamo_kvtc.errors import ChunkTableError, EncodeRangeError, PayloadError, ReservedBitsError

__all__ = ["RdReferenceCodec", "pack_rd", "predict", "project_rd", "reconstruct_rd", "unpack_rd"]

_LIMITS = (32_767, 127, 7, 1)
_LOWEST_LEVEL, _HIGHEST_LEVEL = -5, 10


class RdReferenceCodec(ReferenceCodec):
    """The rd profile by `KvCodec`'s contract, for tests and for readers; parameters as `ReferenceCodec`."""

    profile = Profile.RD

    def _payload_bounds(self, plan: Any, coded: int) -> tuple[int, int]:
        least = _side_size(coded, 0) + sum(_class_sizes(plan, coded))
        return least, least + 6 * _most_escapes(plan, coded)

    def _cut(self, plan: Any, coded: int, size: int) -> list[int]:
        symbols = sum(_class_sizes(plan, coded))
        chunks = [size - symbols]
        while symbols:
            chunks.append(min(symbols, 65_536))
            symbols -= chunks[-1]
        return chunks

    def _encode_side(self, rows: Array, side: Any, plan_id: int) -> bytes:
        return pack_rd(project_rd(rows, side), predict(rows, side), side.plans[plan_id])

    def _decode_side(self, payload: bytes, side: Any, plan_id: int, coded: int) -> Array:
        return reconstruct_rd(unpack_rd(payload, side.plans[plan_id], coded), side, side.plans[plan_id])


# --- rows and coefficients ---------------------------------------------------------------------------


def predict(rows: Array, side: RdSideParameters) -> list[int]:
    """Return the importance level of each of the rows ``[tokens, row]``."""
    mean, weights = side.mean.double().numpy(), side.importance.double().numpy()
    logarithms = ((rows - mean) @ weights + side.importance_bias).tolist()
    return [min(max(round(number), _LOWEST_LEVEL), _HIGHEST_LEVEL) for number in logarithms]


def project_rd(rows: Array, side: RdSideParameters) -> Array:
    """Return all coefficients ``[tokens, components]`` of rows ``[tokens, row]``."""
    in_metric = _times_blocks(rows - side.mean.double().numpy(), side.metric.double())
    return np.asarray(in_metric @ side.basis.double().numpy().T)


def reconstruct_rd(coefficients: Array, side: RdSideParameters, plan: RdPlan) -> Array:
    """Return the rows ``[tokens, row]`` of coefficients ``[tokens, stored]``."""
    in_metric = coefficients @ side.basis.double().numpy()[plan.components.tolist()]
    centred = _times_blocks(in_metric, torch.linalg.inv(side.metric.double()))
    return np.asarray(centred + side.mean.double().numpy())


def _times_blocks(rows: Array, blocks: torch.Tensor) -> Array:
    """Multiply each head of rows by its block."""
    size = blocks.shape[-1]
    result = np.zeros_like(rows)
    for head, block in enumerate(blocks.numpy()):
        columns = slice(head * size, (head + 1) * size)
        result[:, columns] = rows[:, columns] @ block
    return result


# --- payload -----------------------------------------------------------------------------------------


def pack_rd(coefficients: Array, levels: list[int], plan: RdPlan) -> bytes:
    """Quantise ``[tokens, components]`` and return the payload.

    Raises
    ------
    EncodeRangeError
        If symbols or escapes do not hold the coefficients.
    """
    tokens, step = len(levels), np.float32(plan.step)
    regions: list[bytearray] = [bytearray() for _ in range(5)]
    escapes: list[tuple[int, int]] = []
    for row, (component, kind) in enumerate(zip(plan.components.tolist(), _classes(plan), strict=True)):
        symbols = []
        for token, level in enumerate(levels):
            scale = np.float32(2.0 ** (level / 2))
            u = np.float32(coefficients[token, component]) * (scale / step)
            magnitude = np.floor(np.abs(u) + np.float32(plan.rounding[row]))
            if not magnitude <= 32_767:
                raise EncodeRangeError("a coefficient is not finite or too large; keep this block raw")
            symbol = int(math.copysign(magnitude, u))
            if abs(symbol) > _LIMITS[kind]:
                escapes.append((row * tokens + token, symbol))
            symbols.append(min(max(symbol, -_LIMITS[kind]), _LIMITS[kind]))
        if kind == 0:
            lows = [(symbol + 128) % 256 - 128 for symbol in symbols]
            regions[0] += bytes(
                (symbol - low) // 256 % 256 for symbol, low in zip(symbols, lows, strict=True)
            )
            regions[1] += bytes(low % 256 for low in lows)
        elif kind == 1:
            regions[2] += bytes(symbol % 256 for symbol in symbols)
        else:
            regions[kind + 1] += _join(symbols, 2, 16) if kind == 2 else _join(symbols, 5, 3)
    if len(escapes) > _most_escapes(plan, tokens):
        raise EncodeRangeError(f"{len(escapes)} symbols are beyond their classes; keep this block raw")
    return _pack_side(levels, escapes) + b"".join(regions)


def _pack_side(levels: list[int], escapes: list[tuple[int, int]]) -> bytes:
    gaps, before = [], -1
    for index, _ in escapes:
        gaps.append(index - before - 1)
        before = index
    zigzag = [2 * symbol if symbol >= 0 else -2 * symbol - 1 for _, symbol in escapes]
    planes = [[gap & 0xFF for gap in gaps], [number & 0xFF for number in zigzag]]
    planes += [[gap >> shift & 0xFF for gap in gaps] for shift in (8, 16, 24)]
    planes.append([number >> 8 for number in zigzag])
    packed_levels = _join([level - _LOWEST_LEVEL for level in levels], 2, 16)
    return struct.pack("<I", len(escapes)) + packed_levels + b"".join(map(bytes, planes))


def unpack_rd(payload: bytes, plan: RdPlan, tokens: int) -> Array:
    """Return the coefficients ``[tokens, stored]`` of a payload, scales undone.

    Raises
    ------
    ChunkTableError, PayloadError, ReservedBitsError
        If the payload has the wrong size, or holds what no encoder writes.
    """
    sizes = _class_sizes(plan, tokens)
    count = struct.unpack_from("<I", payload)[0] if len(payload) >= 4 else -1
    if not 0 <= count <= _most_escapes(plan, tokens) or len(payload) != _side_size(tokens, count) + sum(
        sizes
    ):
        raise ChunkTableError("the payload's size does not fit its plan, tokens and escapes")
    levels = [level + _LOWEST_LEVEL for level in _split(payload[4 : _side_size(tokens, 0)], tokens, 2, 16)]
    symbols: list[list[int]] = []
    at = _side_size(tokens, count)
    wide = plan.counts[0] * tokens
    for kind, components in enumerate(plan.counts):
        row_bytes = sizes[kind] // components if components else 0
        for row in range(components):
            if kind == 0:
                high = payload[at + row * tokens : at + (row + 1) * tokens]
                low = payload[at + wide + row * tokens : at + wide + (row + 1) * tokens]
                numbers = [_signed(256 * h + _signed(b, 256), 65_536) for h, b in zip(high, low, strict=True)]
            else:
                data = payload[at + row * row_bytes : at + (row + 1) * row_bytes]
                per_byte, base = ((1, 256), (2, 16), (5, 3))[kind - 1]
                numbers = [_signed(digit, base) for digit in _split(data, tokens, per_byte, base)]
            if min(numbers, default=0) < -_LIMITS[kind]:
                raise PayloadError("a symbol is beyond its class; drop the stream")
            symbols.append(numbers)
        at += sizes[kind]
    _restore(symbols, payload[_side_size(tokens, 0) : _side_size(tokens, count)], plan, tokens)
    return _values(symbols, levels, plan)


def _restore(symbols: list[list[int]], side: bytes, plan: RdPlan, tokens: int) -> None:
    count, classes, index = len(side) // 6, _classes(plan), -1
    for i in range(count):
        gap = side[i] | side[2 * count + i] << 8 | side[3 * count + i] << 16 | side[4 * count + i] << 24
        zigzag = side[count + i] | side[5 * count + i] << 8
        index += gap + 1
        symbol = -(zigzag + 1) // 2 if zigzag % 2 else zigzag // 2
        if index >= len(symbols) * tokens:
            raise PayloadError("an escape lies behind the last symbol; drop the stream")
        row, token = divmod(index, tokens)
        limit = _LIMITS[classes[row]]
        if not limit < abs(symbol) <= 32_767 or symbols[row][token] != min(max(symbol, -limit), limit):
            raise PayloadError("an escape does not agree with its clamped symbol; drop the stream")
        symbols[row][token] = symbol


def _values(symbols: list[list[int]], levels: list[int], plan: RdPlan) -> Array:
    coefficients = np.zeros((len(levels), len(symbols)))
    offsets = plan.offsets.tolist()
    for row, numbers in enumerate(symbols):
        for token, symbol in enumerate(numbers):
            if symbol:
                magnitude = abs(symbol) + offsets[0 if abs(symbol) == 1 else 1][row]
                scale = 2.0 ** (levels[token] / 2)
                coefficients[token, row] = math.copysign(magnitude, symbol) * plan.step / scale
    return coefficients


def _classes(plan: RdPlan) -> list[int]:
    """Return the class of each row of symbols."""
    return [kind for kind, count in enumerate(plan.counts) for _ in range(count)]


def _class_sizes(plan: RdPlan, tokens: int) -> list[int]:
    row_bytes = (2 * tokens, tokens, math.ceil(tokens / 2), math.ceil(tokens / 5))
    return [count * size for count, size in zip(plan.counts, row_bytes, strict=True)]


def _side_size(tokens: int, escapes: int) -> int:
    return 4 + math.ceil(tokens / 2) + 6 * escapes


def _most_escapes(plan: RdPlan, tokens: int) -> int:
    room = (65_536 - _side_size(tokens, 0)) // 6
    return min(8_192, 32 * tokens, sum(plan.counts[1:]) * tokens, room)


def _join(digits: list[int], per_byte: int, base: int) -> bytes:
    """Write digits modulo `base` into bytes, the first as the lowest."""
    packed = bytearray()
    for start in range(0, len(digits), per_byte):
        packed.append(sum(d % base * base**place for place, d in enumerate(digits[start : start + per_byte])))
    return bytes(packed)


def _split(data: bytes, count: int, per_byte: int, base: int) -> list[int]:
    """Return `count` digits of bytes."""
    if any(byte >= base**per_byte for byte in data):
        raise PayloadError("a byte holds more than its digits; drop the stream")
    digits = [byte // base**place % base for byte in data for place in range(per_byte)]
    if any(digits[count:]):
        raise ReservedBitsError("digits behind the last token are not 0; drop the stream")
    return digits[:count]


def _signed(number: int, base: int) -> int:
    """Return the number around 0 that `number` stands for modulo `base`; of two, the negative one."""
    number %= base
    return number - base if number >= base / 2 else number
