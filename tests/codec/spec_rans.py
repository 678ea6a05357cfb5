"""Chunks of rANS, from docs/bitstream.md, section 4.1; shares no code with the package."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

from spec_error import require

WEIGHTS = [0, 0, 1, 2, 3, 4, 7, 11, 18, 29, 46, 75, 121, 196, 317, 512]


class Reader:
    """Takes bytes from the front."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> bytes:
        require(self.at + size <= len(self.data), "EntropyDecodeError")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")


def read_table(reader: Reader) -> list[int]:
    """The 257 borders of the symbols' slots."""
    begin = reader.at
    rows = reader.number(2)
    symbols = []
    for row in range(16):
        if rows >> row & 1:
            mask = reader.number(2)
            require(mask != 0, "EntropyDecodeError")
            symbols += [16 * row + bit for bit in range(16) if mask >> bit & 1]
    nibbles = [nibble for byte in reader.take((len(symbols) + 1) // 2) for nibble in (byte & 15, byte >> 4)]
    require(not any(nibbles[len(symbols) :]), "EntropyDecodeError")
    require(not any(reader.take((reader.at - begin) % 2)), "EntropyDecodeError")
    levels = dict(zip(symbols, nibbles, strict=False))
    require(all(levels.values()), "EntropyDecodeError")
    weights = [WEIGHTS[levels.get(symbol, 0)] for symbol in range(256)]
    require(sum(weights) > 0, "EntropyDecodeError")
    ranks = accumulate((symbol in levels for symbol in range(256)), initial=0)
    below = accumulate(weights, initial=0)
    spare = 4096 - len(symbols)
    return [rank + weight * spare // sum(weights) for rank, weight in zip(ranks, below, strict=True)]


def decode(stored: bytes, size: int) -> bytes:
    require(len(stored) % 2 == 0, "EntropyDecodeError")
    reader = Reader(stored)
    count, reserved = reader.number(1), reader.number(1)
    require(1 <= count <= 16 and reserved == 0, "EntropyDecodeError")
    lengths = [reader.number(2) for _ in range(count - 1)]
    lengths.append((size + 31) // 32 - sum(lengths))
    require(min(lengths) >= 1, "EntropyDecodeError")
    tables = [table for length in lengths for table in [read_table(reader)] * length]
    states = [reader.number(4) for _ in range(32)]
    require(min(states) >= 65536, "EntropyDecodeError")
    plain = []
    for index in range(size):
        borders, lane = tables[index // 32], index % 32
        slot = states[lane] % 4096
        symbol = bisect_right(borders, slot) - 1
        states[lane] = (
            (borders[symbol + 1] - borders[symbol]) * (states[lane] // 4096) + slot - borders[symbol]
        )
        if states[lane] < 65536:
            states[lane] = states[lane] * 65536 + reader.number(2)
        plain.append(symbol)
    require(states == [65536] * 32 and reader.at == len(stored), "EntropyDecodeError")
    return bytes(plain)
