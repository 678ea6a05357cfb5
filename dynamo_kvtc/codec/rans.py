"""Order-0 rANS in 32 lanes, which a GPU decodes side by side (`docs/bitstream.md`, section 4.1).

Steps of many chunks are taken together, in arrays ``[chunks, 32]``: on a CPU the time goes into calls of
numpy, whose number does not depend on how many chunks there are.
`dynamo_kvtc.codec.rans_reference` does the same a byte at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from dynamo_kvtc.codec.entropy_base import MAX_RANS_CHUNK_BYTES, RANS, Buffer, EntropyCoder
from dynamo_kvtc.codec.rans_segments import LANES, MAX_SEGMENTS, segment_steps
from dynamo_kvtc.codec.rans_tables import (
    MAX_TABLE_BYTES,
    TOTAL,
    TOTAL_BITS,
    choose_levels,
    frequencies_of,
    pack_table,
    read_table,
)
from dynamo_kvtc.errors import EntropyDecodeError

__all__ = ["RansCoder"]

#: States lie in [LOW, 2**32) between steps; the least one is the first of an encoder, the last of a decoder.
_LOW = np.uint32(1 << 16)
_WORD_SHIFT = np.uint32(16)
_TOTAL_SHIFT = np.uint32(TOTAL_BITS)
_SLOT = np.uint32(TOTAL - 1)

#: From this shifted state on an encoder gives up a word: a symbol's frequency, shifted as far.
_FULL_BITS = 32 - TOTAL_BITS

_STATE_BYTES = 4 * LANES


@dataclass(frozen=True, eq=False)
class _Stored:
    """A chunk taken apart: steps of its segments and levels of their tables, first states ``[32]``, words."""

    plain_size: int
    steps: list[int]
    levels: list[NDArray[np.uint8]]
    states: NDArray[np.uint32]
    words: NDArray[np.uint16]


class RansCoder(EntropyCoder):
    """Order-0 rANS. Frequencies change within a chunk where another table pays.

    Decoding takes, whatever the chunks hold, six bytes for each plain one and 13 for each of the 4,096
    slots of a table: 14 MB at most for a batch whose every chunk has 16 tables.
    """

    coder_id = RANS
    name = "rans"
    max_plain_size = MAX_RANS_CHUNK_BYTES
    batch = 16

    def encode(self, plain: Buffer) -> bytes:
        """Encode one chunk as one run."""
        return self.encode_runs(plain, (len(plain),))

    def encode_runs(self, plain: Buffer, runs: Sequence[int]) -> bytes:
        """Encode one chunk; frequencies may change where a run begins."""
        return self.encode_many([(plain, runs)])[0]

    def encode_many(self, chunks: Sequence[tuple[Buffer, Sequence[int]]]) -> list[bytes]:
        """Encode chunks, each with its runs; see `EntropyCoder.encode_many`."""
        for plain, _ in chunks:
            self._check_plain(plain)
        arrays = [np.frombuffer(plain, dtype=np.uint8) for plain, _ in chunks]
        full = [index for index, plain in enumerate(arrays) if plain.size]
        coded = [b""] * len(chunks)
        made = _encode([arrays[index] for index in full], [chunks[index][1] for index in full])
        for index, data in zip(full, made, strict=True):
            coded[index] = data
        return coded

    def decode(self, data: Buffer, plain_size: int) -> bytes:
        """Decode one chunk."""
        return self.decode_many([(data, plain_size)])[0]

    def decode_many(self, chunks: Sequence[tuple[Buffer, int]]) -> list[bytes]:
        """Decode chunks, each to its plain size; see `EntropyCoder.decode_many`."""
        _require(all(plain_size or not data for data, plain_size in chunks), "length")
        full = [(data, plain_size) for data, plain_size in chunks if plain_size]
        plains = iter(_decode([_take_apart(data, plain_size) for data, plain_size in full]))
        return [next(plains) if plain_size else b"" for _, plain_size in chunks]

    def max_encoded_size(self, plain_size: int) -> int:
        """Return 12 bits and a rounding for each byte, with the largest tables."""
        return plain_size * 25 // 16 + MAX_SEGMENTS * (2 + MAX_TABLE_BYTES) + 2 * _STATE_BYTES


# --- encode --------------------------------------------------------------------------------------


def _encode(plains: Sequence[NDArray[np.uint8]], runs: Sequence[Sequence[int]]) -> list[bytes]:
    if not plains:
        return []
    segments = [segment_steps(plain, own) for plain, own in zip(plains, runs, strict=True)]
    levels = [_levels(plain, steps) for plain, steps in zip(plains, segments, strict=True)]
    most = max(sum(steps) for steps in segments)
    # A lane without a byte codes a symbol that is certain: its state stays.
    frequencies = np.full((most, len(plains), LANES), TOTAL, dtype=np.uint32)
    starts = np.zeros_like(frequencies)
    for index, (plain, steps, own) in enumerate(zip(plains, segments, levels, strict=True)):
        padded = np.zeros(sum(steps) * LANES, dtype=np.uint8)
        padded[: plain.size] = plain
        symbols = padded.reshape(-1, LANES)
        for table, stop, length in zip(frequencies_of(own), accumulate(steps), steps, strict=True):
            part = symbols[stop - length : stop]
            frequencies[stop - length : stop, index] = table[part]
            starts[stop - length : stop, index] = (np.cumsum(table, dtype=np.uint32) - table)[part]
        idle = slice(plain.size - (len(symbols) - 1) * LANES, None)
        frequencies[len(symbols) - 1, index, idle], starts[len(symbols) - 1, index, idle] = TOTAL, 0
    states, words, given = _run_encoder(frequencies, starts)
    return [
        _put_together(steps, own, states[index], words[:, index][given[:, index]])
        for index, (steps, own) in enumerate(zip(segments, levels, strict=True))
    ]


def _levels(plain: NDArray[np.uint8], steps: Sequence[int]) -> NDArray[np.uint8]:
    """Return the levels of each segment: ``[segments, 256]``."""
    parts = np.split(plain, [LANES * stop for stop in accumulate(steps)][:-1])
    return np.stack([choose_levels(np.bincount(part, minlength=256)) for part in parts])


def _run_encoder(
    frequencies: NDArray[np.uint32], starts: NDArray[np.uint32]
) -> tuple[NDArray[np.uint32], NDArray[np.uint16], NDArray[np.bool_]]:
    """Take all steps, the last first.

    Returns
    -------
    tuple
        The states at the end, ``[chunks, 32]``; the lowest words of all states, and which of them were given
        up, ``[steps, chunks, 32]``. The decoder takes these in their order.
    """
    x = np.full(frequencies.shape[1:], _LOW, dtype=np.uint32)
    words = np.empty(frequencies.shape, dtype=np.uint16)
    given = np.empty(frequencies.shape, dtype=np.bool_)
    for step in reversed(range(len(frequencies))):
        f = frequencies[step]
        full = np.greater_equal(x >> _FULL_BITS, f, out=given[step])
        words[step] = x  # its lowest 16 bits
        x >>= full * _WORD_SHIFT
        quotient = x // f
        # (quotient << 12) + (x - quotient * f) + start
        x += quotient * (TOTAL - f)
        x += starts[step]
    return x, words, given


def _put_together(
    steps: Sequence[int],
    levels: NDArray[np.uint8],
    states: NDArray[np.uint32],
    words: NDArray[np.uint16],
) -> bytes:
    head = bytes([len(steps), 0]) + np.array(steps[:-1], dtype="<u2").tobytes()
    packed = b"".join(map(pack_table, levels))
    return head + packed + states.astype("<u4").tobytes() + words.astype("<u2").tobytes()


# --- decode --------------------------------------------------------------------------------------


def _take_apart(data: Buffer, plain_size: int) -> _Stored:
    array = np.frombuffer(data, dtype=np.uint8)
    total, count = -(-plain_size // LANES), int(array[0]) if array.size else 0
    _require(array.size % 2 == 0, "length")
    _require(1 <= count <= MAX_SEGMENTS and array.size >= 2 * count and not array[1], "number of segments")
    steps = array[2 : 2 * count].view("<u2").astype(np.int64).tolist()
    steps.append(total - sum(steps))
    _require(min(steps) >= 1 and plain_size <= MAX_RANS_CHUNK_BYTES, "lengths of segments")
    at, levels = 2 * count, []
    for _ in range(count):
        table, size = read_table(array[at:])
        levels.append(table)
        at += size
    _require(array.size >= at + _STATE_BYTES, "length")
    states = array[at : at + _STATE_BYTES].view("<u4").astype(np.uint32)
    _require(bool((states >= _LOW).all()), "first states")
    return _Stored(plain_size, steps, levels, states, array[at + _STATE_BYTES :].view("<u2"))


def _decode(chunks: Sequence[_Stored]) -> list[bytes]:
    if not chunks:
        return []
    # The last table stands for lanes without a byte: one symbol, which is certain, so that states stay.
    idle = np.zeros(256, dtype=np.uint8)
    idle[0] = 15
    tables = frequencies_of(np.stack([levels for chunk in chunks for levels in chunk.levels] + [idle]))
    # A symbol has as many of a table's slots as its frequency says.
    slots = tables.reshape(-1)
    symbols = np.repeat(np.tile(np.arange(256, dtype=np.uint8), len(tables)), slots)
    frequencies = np.repeat(slots, slots)
    starts = (np.cumsum(tables, axis=1, dtype=np.uint32) - tables).reshape(-1)
    offsets = np.tile(np.arange(TOTAL, dtype=np.uint32), len(tables))
    offsets -= np.repeat(starts, slots)

    steps = [sum(chunk.steps) for chunk in chunks]
    places = np.full((max(steps), len(chunks), LANES), (len(tables) - 1) * TOTAL, dtype=np.int32)
    first = 0
    for index, chunk in enumerate(chunks):
        own = first + np.arange(len(chunk.steps))
        places[: steps[index], index] = np.repeat(own, chunk.steps)[:, None] * TOTAL
        lanes = chunk.plain_size - (steps[index] - 1) * LANES
        places[steps[index] - 1, index, lanes:] = (len(tables) - 1) * TOTAL
        first += len(chunk.steps)
    _run_decoder(chunks, places, frequencies, offsets)
    plain = symbols[places]
    return [plain[:, index].tobytes()[: chunk.plain_size] for index, chunk in enumerate(chunks)]


def _run_decoder(
    chunks: Sequence[_Stored],
    places: NDArray[np.int32],
    frequencies: NDArray[np.uint32],
    offsets: NDArray[np.uint32],
) -> None:
    """Take all steps.

    Parameters
    ----------
    places : NDArray[np.int32]
        ``[steps, chunks, 32]``: where each lane's table begins; where its symbol stands in it, afterwards.
    frequencies, offsets : NDArray[np.uint32]
        ``[tables * 4096]``: of the symbol of each slot, and how far the slot lies behind the symbol's first.
    """
    x = np.stack([chunk.states for chunk in chunks])
    # A word more, so that there is one to read where a chunk has none left.
    words = np.concatenate([*(chunk.words for chunk in chunks), np.zeros(1, dtype="<u2")]).astype(np.uint32)
    ends = np.cumsum([chunk.words.size for chunk in chunks])
    last_word = (ends - [chunk.words.size for chunk in chunks] - 1)[:, None]
    slot, found = np.empty_like(x), np.empty_like(x)
    short, word = np.empty(x.shape, dtype=np.bool_), np.empty(x.shape, dtype=np.int64)
    # The time goes into calls, so there are few, and none makes an array.
    for place in places:
        np.bitwise_and(x, _SLOT, slot)
        np.add(place, slot.view(np.int32), place)
        np.right_shift(x, _TOTAL_SHIFT, x)
        np.multiply(x, frequencies.take(place, None, found, "clip"), x)
        np.add(x, offsets.take(place, None, found, "clip"), x)
        np.less(x, _LOW, short)
        # The word that a lane takes: as many behind its chunk's last as lanes up to it take one.
        np.add.accumulate(short, 1, np.int64, word)
        np.add(word, last_word, word)
        words.take(word, None, found, "clip")
        np.left_shift(x, _WORD_SHIFT, x, where=short)
        np.bitwise_or(x, found, x, where=short)
        last_word[...] = word[:, -1:]
    if (last_word[:, 0] + 1 != ends).any() or (x != _LOW).any():
        raise EntropyDecodeError(
            "a rANS chunk does not end with the states and at the word where it must; drop the stream"
        )


def _require(sound: bool, what: str) -> None:
    if not sound:
        raise EntropyDecodeError(f"a rANS chunk's {what} cannot be; drop the stream")
