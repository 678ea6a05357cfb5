"""The rANS coder a byte at a time, in the order of `docs/bitstream.md`, 4.1: slow and obvious.

What `dynamo_kvtc.codec.rans` does in arrays is tested against this. Segments and levels are the
encoder's choice, so they are given here.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from dynamo_kvtc.errors import EntropyDecodeError

__all__ = ["decode", "encode", "frequencies_of"]

_LANES = 32
_LOW = 1 << 16
_WEIGHTS = (0, 0, 1, 2, 3, 4, 7, 11, 18, 29, 46, 75, 121, 196, 317, 512)


def frequencies_of(levels: Sequence[int]) -> list[int]:
    """Return the frequencies of the 256 levels of a table."""
    count, total = sum(level > 0 for level in levels), sum(_WEIGHTS[level] for level in levels)
    found, seen, weight = [], 0, 0
    for level in levels:
        begin = seen + weight * (4096 - count) // total
        seen += level > 0
        weight += _WEIGHTS[level]
        found.append(seen + weight * (4096 - count) // total - begin)
    return found


def encode(plain: bytes, segments: Sequence[tuple[int, Sequence[int]]]) -> bytes:
    """Return the chunk of some plain bytes.

    Parameters
    ----------
    segments : Sequence of (int, Sequence[int])
        Steps of each segment, and the 256 levels of its table.
    """
    tables = [frequencies_of(levels) for _, levels in segments]
    of_step = [index for index, (steps, _) in enumerate(segments) for _ in range(steps)]
    states, words = [_LOW] * _LANES, []
    for at in reversed(range(len(plain))):
        step, lane = divmod(at, _LANES)
        frequencies, symbol, x = tables[of_step[step]], plain[at], states[lane]
        if x >= frequencies[symbol] << 20:
            words.append(x & 0xFFFF)
            x >>= 16
        quotient, rest = divmod(x, frequencies[symbol])
        states[lane] = (quotient << 12) + rest + sum(frequencies[:symbol])
    lengths = [steps for steps, _ in segments]
    return (
        struct.pack(f"<BB{len(lengths) - 1}H", len(lengths), 0, *lengths[:-1])
        + b"".join(_pack_table(levels) for _, levels in segments)
        + struct.pack("<32I", *states)
        + struct.pack(f"<{len(words)}H", *reversed(words))
    )


def _pack_table(levels: Sequence[int]) -> bytes:
    masks = [sum((levels[16 * row + i] > 0) << i for i in range(16)) for row in range(16)]
    packed = [sum((mask > 0) << row for row, mask in enumerate(masks)), *filter(None, masks)]
    occurring = [level for level in levels if level]
    nibbles = sum(level << 4 * index for index, level in enumerate(occurring))
    table = struct.pack(f"<{len(packed)}H", *packed) + nibbles.to_bytes((len(occurring) + 1) // 2, "little")
    return table + bytes(len(table) % 2)


def decode(data: bytes, plain_size: int) -> bytes:
    """Return the plain bytes of a chunk.

    Raises
    ------
    EntropyDecodeError
        If `data` is no chunk of `plain_size` bytes.
    """
    steps = -(-plain_size // _LANES)
    count, reserved = _take("<BB", data, 0)
    _require(1 <= count <= 16 and not reserved, "number of segments")
    lengths = _take(f"<{count - 1}H", data, 2)
    lengths = (*lengths, steps - sum(lengths))
    _require(all(length >= 1 for length in lengths), "lengths of segments")
    at = 2 * count
    tables: list[list[int]] = []
    for length in lengths:
        frequencies, at = _read_table(data, at)
        tables += [frequencies] * length
    states = list(_take("<32I", data, at))
    _require(all(x >= _LOW for x in states), "first states")
    at += 4 * _LANES
    plain = bytearray()
    for index in range(plain_size):
        step, lane = divmod(index, _LANES)
        slot, start, symbol = states[lane] % 4096, 0, 0
        while slot >= start + tables[step][symbol]:
            start += tables[step][symbol]
            symbol += 1
        x = tables[step][symbol] * (states[lane] >> 12) + slot - start
        if x < _LOW:
            x = x << 16 | _take("<H", data, at)[0]
            at += 2
        states[lane] = x
        plain.append(symbol)
    _require(states == [_LOW] * _LANES and at == len(data), "end")
    return bytes(plain)


def _read_table(data: bytes, at: int) -> tuple[list[int], int]:
    begin = at
    (rows,) = _take("<H", data, at)
    masks = _take(f"<{rows.bit_count()}H", data, at + 2)
    _require(all(masks), "symbols")
    at += 2 + 2 * len(masks)
    used = [row for row in range(16) if rows >> row & 1]
    symbols = [
        16 * row + i for row, mask in zip(used, masks, strict=True) for i in range(16) if mask >> i & 1
    ]
    nibbles = int.from_bytes(_bytes(data, at, (len(symbols) + 1) // 2), "little")
    at += (len(symbols) + 1) // 2
    levels = [0] * 256
    for index, symbol in enumerate(symbols):
        levels[symbol] = nibbles >> 4 * index & 15
    padding = _bytes(data, at, (at - begin) % 2)
    sound = all(levels[symbol] for symbol in symbols) and not nibbles >> 4 * len(symbols)
    _require(sound and not any(padding) and max(levels) > 1, "table")
    return frequencies_of(levels), at + len(padding)


def _take(form: str, data: bytes, at: int) -> tuple[int, ...]:
    return struct.unpack(form, _bytes(data, at, struct.calcsize(form)))


def _bytes(data: bytes, at: int, size: int) -> bytes:
    _require(at + size <= len(data), "length")
    return data[at : at + size]


def _require(sound: bool, what: str) -> None:
    if not sound:
        raise EntropyDecodeError(f"a rANS chunk's {what} cannot be; drop the stream")
