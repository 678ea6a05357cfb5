"""Symbols and token levels of one section of the rd profile to its payload's bytes and back.

A payload is side data (number of escapes, levels, escapes), then five regions of symbols: the high and the
low bytes of WIDE components, BYTE, NIBBLE and TRIT components; component-major, since entropy coders need
peaked statistics. Only the side data's size depends on the data; it is a chunk of its own.

An escape is a symbol beyond its class's limit. It is stored clamped in its region, and in full among the
escapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isqrt

import numpy as np
from numpy.typing import NDArray

from dynamo_kvtc.codec.importance import MIN_LEVEL
from dynamo_kvtc.codec.rd_plan import SymbolClass
from dynamo_kvtc.codec.rd_rows import pack_rows, row_bytes, unpack_rows
from dynamo_kvtc.errors import ChunkTableError, EncodeRangeError, PayloadError, ReservedBitsError

__all__ = ["ESCAPE_BYTES", "MAX_ESCAPES", "RdLayout", "RdSection", "pack", "unpack"]

#: Largest number of escapes in a section.
MAX_ESCAPES = 8_192

#: Bytes of an escape before entropy coding: 4 of its gap, 2 of its value.
ESCAPE_BYTES = 6

_CHUNK_BYTES = 65_536

#: Bytes of a run for each square root of a token.
_RUN_BYTES = 400

#: A region smaller than this shares a run with the next one.
_LEAST_RUN_BYTES = 256

#: The region that is mostly zeros gets a chunk of its own from this size on.
_LEAST_CHUNK_BYTES = 1_024

_COUNT_BYTES = 4


@dataclass(frozen=True, eq=False)
class RdSection:
    """The quantised keys or values of one layer group of one tier block.

    Attributes
    ----------
    levels : NDArray[np.int8]
        ``[tokens]``, importance levels.
    symbols : NDArray[np.int16]
        ``[stored, tokens]``, components as in the plan.
    """

    levels: NDArray[np.int8]
    symbols: NDArray[np.int16]


@dataclass(frozen=True)
class RdLayout:
    """Sizes of one section's payload.

    Attributes
    ----------
    counts : tuple[int, ...]
        Components of each `SymbolClass`.
    """

    counts: tuple[int, ...]

    def class_sizes(self, tokens: int) -> tuple[int, ...]:
        """Return the bytes of the symbols of each class, for a section of `tokens` coded tokens."""
        return tuple(
            count * row_bytes(symbol_class, tokens)
            for symbol_class, count in zip(SymbolClass, self.counts, strict=True)
        )

    def side_size(self, tokens: int, escapes: int = 0) -> int:
        """Return the bytes of the side data with some number of escapes."""
        return _COUNT_BYTES + -(-tokens // 2) + ESCAPE_BYTES * escapes

    def max_escapes(self, tokens: int) -> int:
        """Return the most escapes that a section may have; its side data stays one DEFLATE chunk."""
        escapable = sum(self.counts[SymbolClass.BYTE :]) * tokens
        return min(MAX_ESCAPES, escapable, (_CHUNK_BYTES - self.side_size(tokens)) // ESCAPE_BYTES)

    def payload_bounds(self, tokens: int) -> tuple[int, int]:
        """Return the least and the most bytes of a payload."""
        symbols = sum(self.class_sizes(tokens))
        most = self.side_size(tokens, self.max_escapes(tokens))
        return symbols + self.side_size(tokens), symbols + most

    def max_chunks(self, tokens: int) -> list[tuple[int, ...]]:
        """Return the runs of the chunks that a payload is cut into; the first chunk may be smaller."""
        side = self.side_size(tokens, self.max_escapes(tokens))
        wide, *others = self.class_sizes(tokens)
        return [(side,), *cut((wide // 2, wide // 2, *others), tokens)]


def cut(regions: Sequence[int], tokens: int) -> list[tuple[int, ...]]:
    """Cut the regions of symbols into runs, and join runs to chunks.

    A run is coded with a Huffman code of its own. Long ones mix components of different rates, short ones
    do not pay for their code; the best length grows with the tokens of a component (`docs/science.md`).
    The last region, which is mostly zeros, is not joined to others in a chunk.

    Returns
    -------
    list[tuple[int, ...]]
        Sizes of the runs of each chunk, none of them 0.
    """
    target = min(_RUN_BYTES * isqrt(tokens), _CHUNK_BYTES // 2)
    chunks: list[list[int]] = [[]]
    pending = 0
    for index, region in enumerate(regions):
        size, pending = region + pending, 0
        last = index == len(regions) - 1
        if size < _LEAST_RUN_BYTES and not last:
            pending = size
            continue
        pieces = max(1, round(size / target))
        if last and size >= _LEAST_CHUNK_BYTES:
            chunks.append([])
        for start, stop in pairwise(size * i // pieces for i in range(pieces + 1)):
            if sum(chunks[-1]) + stop - start > _CHUNK_BYTES:
                chunks.append([])
            chunks[-1].append(stop - start)
    return [tuple(run for run in chunk if run) for chunk in chunks if any(chunk)]


def pack(section: RdSection, layout: RdLayout) -> NDArray[np.uint8]:
    """Return the payload of a section.

    Raises
    ------
    EncodeRangeError
        If it has too many escapes: the KV is too unlike what the plan was made for.
    """
    tokens = section.levels.size
    regions, indices, values = [], [], []
    for symbol_class, (start, stop) in zip(SymbolClass, _spans(layout.counts), strict=True):
        symbols = section.symbols[start:stop]
        clamped = symbols.clip(-symbol_class.limit, symbol_class.limit)
        beyond = np.flatnonzero(symbols != clamped)
        indices.append(beyond + start * tokens)
        values.append(symbols.reshape(-1)[beyond])
        regions.append(pack_rows(clamped, symbol_class))
    escapes = sum(part.size for part in indices)
    if escapes > layout.max_escapes(tokens):
        raise EncodeRangeError(
            f"{escapes} of the block's symbols are beyond their classes, the format holds "
            f"{layout.max_escapes(tokens)}; keep this block raw, and recalibrate if it happens often"
        )
    side = _pack_side(section.levels, np.concatenate(indices), np.concatenate(values))
    return np.concatenate([side, *regions])


def unpack(payload: NDArray[np.uint8], layout: RdLayout, tokens: int) -> RdSection:
    """Return the section that a payload holds; the inverse of `pack`.

    Raises
    ------
    ChunkTableError
        If the payload has another size than layout, tokens and its number of escapes give.
    PayloadError
        If it holds symbols, digits or escapes that no encoder writes.
    ReservedBitsError
        If padding behind the last token is not 0.
    """
    sizes = layout.class_sizes(tokens)
    side_size = payload.size - sum(sizes)
    if side_size < layout.side_size(tokens):
        raise ChunkTableError(f"a section has {payload.size} payload bytes, too few for its plan and tokens")
    escapes = int(payload[:_COUNT_BYTES].view("<u4")[0])
    if escapes > layout.max_escapes(tokens) or side_size != layout.side_size(tokens, escapes):
        raise ChunkTableError(
            f"a section of {payload.size} payload bytes says that it has {escapes} escapes; drop the stream"
        )
    levels = _unpack_levels(payload[_COUNT_BYTES : layout.side_size(tokens)], tokens)
    symbols = np.empty((sum(layout.counts), tokens), dtype=np.int16)
    offset = side_size
    for symbol_class, (start, stop), size in zip(SymbolClass, _spans(layout.counts), sizes, strict=True):
        data = payload[offset : offset + size]
        symbols[start:stop] = unpack_rows(data, symbol_class, stop - start, tokens)
        offset += size
    if escapes:
        _restore(symbols, layout, payload[layout.side_size(tokens) : side_size])
    return RdSection(levels, symbols)


def _spans(counts: Sequence[int]) -> list[tuple[int, int]]:
    """Return the rows of each class."""
    borders = np.cumsum((0, *counts)).tolist()
    return list(pairwise(borders))


# --- side data -----------------------------------------------------------------------------------


def _pack_side(
    levels: NDArray[np.int8], indices: NDArray[np.int64], values: NDArray[np.int16]
) -> NDArray[np.uint8]:
    count = np.array([indices.size], dtype="<u4").view(np.uint8)
    nibbles = np.zeros(levels.size + levels.size % 2, dtype=np.uint8)
    nibbles[: levels.size] = levels - MIN_LEVEL
    packed_levels = nibbles[0::2] | nibbles[1::2] << 4
    # Gaps and magnitudes are small numbers, so their planes of high bytes are mostly zeros.
    gaps = (np.diff(indices, prepend=-1) - 1).astype(">u4").view(np.uint8).reshape(-1, 4)
    wide = values.astype(np.int32)
    zigzag = np.where(wide < 0, -2 * wide - 1, 2 * wide).astype(">u2").view(np.uint8).reshape(-1, 2)
    return np.concatenate([count, packed_levels, gaps.T.reshape(-1), zigzag.T.reshape(-1)])


def _unpack_levels(data: NDArray[np.uint8], tokens: int) -> NDArray[np.int8]:
    nibbles = np.stack([data & 0xF, data >> 4], axis=1).reshape(-1)
    if nibbles[tokens:].any():
        raise ReservedBitsError("the padding behind the last token's level is not 0; drop the stream")
    levels: NDArray[np.int8] = nibbles[:tokens].astype(np.int8) + np.int8(MIN_LEVEL)
    return levels


def _restore(symbols: NDArray[np.int16], layout: RdLayout, data: NDArray[np.uint8]) -> None:
    """Put escapes in the place of their clamped symbols."""
    escapes = data.size // ESCAPE_BYTES
    planes = data.reshape(ESCAPE_BYTES, escapes)
    gaps = np.ascontiguousarray(planes[:4].T).view(">u4").reshape(-1).astype(np.int64)
    zigzag = np.ascontiguousarray(planes[4:].T).view(">u2").reshape(-1).astype(np.int32)
    indices = np.cumsum(gaps + 1) - 1
    if indices[-1] >= symbols.size:
        raise PayloadError("an escape lies behind the last symbol; drop the stream")
    values = np.where(zigzag & 1, -(zigzag + 1) // 2, zigzag // 2)
    limits = np.repeat([symbol_class.limit for symbol_class in SymbolClass], layout.counts)
    limit = limits[indices // symbols.shape[1]]
    flat = symbols.reshape(-1)
    if (np.abs(values) <= limit).any() or (values.clip(-limit, limit) != flat[indices]).any():
        raise PayloadError("an escape does not agree with its class or its clamped symbol; drop the stream")
    flat[indices] = values
