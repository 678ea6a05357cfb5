"""The numbers of the kvtc profile, step by step, in plain loops: what `ReferenceCodec` strings together.

Float64 throughout, except the quantiser, whose float32 and float16 roundings are part of the format
(`dynamo_kvtc.codec.quantiser` states them).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from dynamo_kvtc.codec.parameters import SideParameters
from dynamo_kvtc.codec.plan import BitPlan, PlanGroup, QuantType
from dynamo_kvtc.codec.rope import RopeParameters
from dynamo_kvtc.errors import ChunkTableError, EncodeRangeError, PayloadError

__all__ = [
    "Array",
    "pack_coefficients",
    "pack_sinks",
    "project",
    "reconstruct",
    "rotate",
    "unpack_coefficients",
    "unpack_sinks",
]

Array = NDArray[np.float64]

# --- rows and coefficients ---------------------------------------------------------------------------


def project(rows: Array, side: SideParameters) -> Array:
    """Return all coefficients ``[tokens, components]`` of rows ``[tokens, row]``."""
    basis: Array = side.basis.double().numpy()
    mean: Array = side.mean.double().numpy()
    return np.asarray((rows - mean) @ basis.T)


def reconstruct(coefficients: Array, side: SideParameters) -> Array:
    """Return the rows ``[tokens, row]`` of coefficients ``[tokens, components]``."""
    basis: Array = side.basis.double().numpy()
    mean: Array = side.mean.double().numpy()
    return np.asarray(coefficients @ basis[: coefficients.shape[1]] + mean)


def rotate(keys: Array, positions: Sequence[int], rope: RopeParameters, *, undo: bool) -> Array:
    """Apply RoPE to keys ``[tokens, layers, heads, head_size]``, or undo it, pair by pair."""
    result: Array = keys.copy()
    frequencies, scale = rope.inv_freq().tolist(), rope.attention_scaling()
    half = rope.rotary_dim // 2
    for token, position in enumerate(positions):
        for pair, frequency in enumerate(frequencies):
            a, b = (pair, pair + half) if rope.style == "half" else (2 * pair, 2 * pair + 1)
            cos, sin = scale * math.cos(position * frequency), scale * math.sin(position * frequency)
            if undo:
                square = cos**2 + sin**2
                cos, sin = cos / square, -sin / square
            x, y = keys[token, ..., a], keys[token, ..., b]
            result[token, ..., a] = x * cos - y * sin
            result[token, ..., b] = y * cos + x * sin
    return result


# --- quantiser ---------------------------------------------------------------------------------------


def e4m3_value(pattern: int) -> float:
    """Return the number that an E4M3FN bit pattern stands for: 1 sign, 4 exponent, 3 mantissa bits."""
    exponent, mantissa = pattern >> 3 & 0xF, pattern & 0x7
    sign = -1.0 if pattern & 0x80 else 1.0
    if exponent == 0xF and mantissa == 0x7:
        return math.nan
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


_E4M3_POSITIVE = np.array([e4m3_value(pattern) for pattern in range(0x7F)])


def e4m3_pattern(number: float) -> int:
    """Return the nearest E4M3FN pattern, of two equally near ones the even one."""
    distances = np.abs(_E4M3_POSITIVE - abs(number))
    nearest = np.flatnonzero(distances == distances.min())
    pattern = int(nearest[0]) if len(nearest) == 1 or nearest[0] % 2 == 0 else int(nearest[1])
    return pattern | (0x80 if math.copysign(1, number) < 0 else 0)


#: Added to a number, leaves it as it is, except that a negative zero becomes positive.
_PLUS_ZERO = np.float16(0)


def up16(number: np.float32) -> np.float16:
    """Round a number that is not negative up to float16."""
    half: np.float16 = np.float16(number) + _PLUS_ZERO
    if np.float32(half) < number:
        half = np.nextafter(half, np.float16(np.inf))
    return half


def quantise_group(c: NDArray[np.float32], group: PlanGroup) -> tuple[np.float16, np.float16, list[int]]:
    """Return shift, scale and symbols of one token's coefficients in one group."""
    low, high = c.min(), c.max()
    if group.type is QuantType.FP8:
        shift = np.float16(np.float32(c.astype(np.float64).mean())) + _PLUS_ZERO
        scale = up16(np.abs(c - np.float32(shift)).max() / np.float32(448))
    else:
        levels = 2**group.type.bits - 1
        shift = np.float16(low) + _PLUS_ZERO
        scale = up16((high - low) / np.float32(levels))
    if not (np.isfinite(shift) and np.isfinite(scale)):
        raise EncodeRangeError("a shift or scale is not a finite float16; keep this block raw")
    if scale == 0:
        return shift, scale, [0] * group.size
    scaled = (c - np.float32(shift)) / np.float32(scale)
    if group.type is QuantType.FP8:
        return shift, scale, [e4m3_pattern(float(number) + 0.0) for number in scaled]
    return shift, scale, [min(max(round(float(number)), 0), levels) for number in scaled]


# --- payload -----------------------------------------------------------------------------------------


def pack_coefficients(coefficients: Array, plan: BitPlan) -> bytes:
    """Quantise ``[tokens, components]`` and return the payload.

    Raises
    ------
    EncodeRangeError
        If the side data cannot carry the coefficients.
    """
    tokens = coefficients.shape[0]
    shifts = np.zeros((len(plan.groups), tokens), dtype="<f2")
    scales = np.zeros((len(plan.groups), tokens), dtype="<f2")
    symbols: dict[int, list[int]] = {}
    with np.errstate(over="ignore", invalid="ignore"):
        c = coefficients.astype(np.float32)
        for index, group in enumerate(plan.groups):
            for token in range(tokens):
                shift, scale, numbers = quantise_group(c[token, group.start : group.stop], group)
                shifts[index, token], scales[index, token] = shift, scale
                for component, number in enumerate(numbers, group.start):
                    symbols.setdefault(component, []).append(number)
    side = shifts.tobytes() + scales.tobytes()
    payload = bytearray(side[1::2] + side[0::2])
    for quant_type in (QuantType.FP8, QuantType.INT4, QuantType.INT2):
        for component in _components(plan, quant_type):
            payload += _pack_symbols(symbols.get(component, []), quant_type.bits)
    return bytes(payload)


def unpack_coefficients(payload: bytes, plan: BitPlan, tokens: int) -> Array:
    """Return the coefficients ``[tokens, plan.rank]`` of a payload; those not stored are 0.

    Raises
    ------
    ChunkTableError, PayloadError
        If the payload is too long or short, or holds numbers that no encoder writes.
    """
    plane = 2 * len(plan.groups) * tokens
    side = np.zeros((plane, 2), dtype=np.uint8)
    side[:, 1] = np.frombuffer(payload[:plane], dtype=np.uint8)
    side[:, 0] = np.frombuffer(payload[plane : 2 * plane], dtype=np.uint8)
    shifts, scales = side.view("<f2").reshape(2, len(plan.groups), tokens).astype(np.float64)
    if not (np.isfinite(shifts).all() and np.isfinite(scales).all()):
        raise PayloadError("the side data holds NaN or infinity; drop the stream")
    group_of = {c: index for index, group in enumerate(plan.groups) for c in range(group.start, group.stop)}
    coefficients = np.zeros((tokens, plan.rank))
    offset = 2 * plane
    for quant_type in (QuantType.FP8, QuantType.INT4, QuantType.INT2):
        row_bytes = math.ceil(tokens * quant_type.bits / 8)
        for component in _components(plan, quant_type):
            row = payload[offset : offset + row_bytes]
            offset += row_bytes
            index = group_of[component]
            for token in range(tokens):
                bit = token * quant_type.bits
                number: float = row[bit // 8] >> bit % 8 & 2**quant_type.bits - 1
                if quant_type is QuantType.FP8:
                    number = e4m3_value(int(number))
                coefficients[token, component] = shifts[index, token] + number * scales[index, token]
    if offset != len(payload):
        raise ChunkTableError(f"a section has {len(payload)} payload bytes instead of {offset}")
    if not np.isfinite(coefficients).all():
        raise PayloadError("the FP8 symbols hold NaN; drop the stream")
    return coefficients


def _components(plan: BitPlan, quant_type: QuantType) -> list[int]:
    return [c for group in plan.groups if group.type is quant_type for c in range(group.start, group.stop)]


def _pack_symbols(symbols: Sequence[int], bits: int) -> bytes:
    """Join symbols in bytes, the first in the lowest bits."""
    packed = bytearray(math.ceil(len(symbols) * bits / 8))
    for index, symbol in enumerate(symbols):
        packed[index * bits // 8] |= symbol << index * bits % 8
    return bytes(packed)


# --- sinks -------------------------------------------------------------------------------------------


def pack_sinks(keys: torch.Tensor, values: torch.Tensor, bits: int) -> bytes:
    """Return the payload of sinks ``[tokens, layers, heads, head_size]``, at 8 or 16 bits.

    Raises
    ------
    EncodeRangeError
        If they hold NaN or infinity.
    """
    if not (torch.isfinite(keys).all() and torch.isfinite(values).all()):
        raise EncodeRangeError("the KV of the sink tokens holds NaN or infinity; keep this block raw")
    scales, elements = bytearray(), bytearray()
    for side in (keys, values):
        for layer in range(side.shape[1]):
            for token in range(side.shape[0]):
                for head in side[token, layer]:
                    if bits == 16:
                        elements += head.contiguous().view(torch.uint8).numpy().tobytes()
                        continue
                    row = head.float().numpy()
                    scale = np.abs(row).max() / np.float32(448)
                    scales += np.array(scale, dtype="<f4").tobytes()
                    for x in row:
                        elements.append(e4m3_pattern(float(x / scale) + 0.0) if scale else 0)
    return bytes(scales + elements)


def unpack_sinks(payload: bytes, shape: Sequence[int], dtype: torch.dtype, bits: int) -> torch.Tensor:
    """Return sinks of `shape` ``[2, layers, tokens, heads, head_size]``."""
    if bits == 16:
        return torch.frombuffer(bytearray(payload), dtype=dtype).view(*shape)
    heads = math.prod(shape[:-1])
    scales = np.frombuffer(payload[: 4 * heads], dtype="<f4").astype(np.float64)
    numbers = np.array([e4m3_value(pattern) for pattern in payload[4 * heads :]])
    return torch.from_numpy(numbers.reshape(heads, -1) * scales[:, None]).view(*shape).to(dtype)
