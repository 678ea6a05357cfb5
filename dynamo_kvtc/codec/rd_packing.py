"""Symbols and token levels of one section of the rd profile to its payload's bytes and back.

A payload is side data (number of escapes, levels, escapes), then five regions of symbols: the high and the
low bytes of WIDE components, BYTE, NIBBLE and TRIT components; component-major, since entropy coders need
peaked statistics. Only the size of the side data depends on the data.

An escape is a symbol beyond its class's limit. It is stored clamped in its region, and in full among the
escapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from dynamo_kvtc.codec.importance import MIN_LEVEL
from dynamo_kvtc.codec.rd_chunks import CHUNK_BYTES, cut_symbols
from dynamo_kvtc.codec.rd_plan import SymbolClass
from dynamo_kvtc.codec.rd_rows import pack_rows, row_bytes, unpack_rows
from dynamo_kvtc.errors import ChunkTableError, EncodeRangeError, PayloadError, ReservedBitsError

__all__ = ["ESCAPE_BYTES", "MAX_ESCAPES", "MAX_TOKEN_ESCAPES", "RdLayout", "RdSection", "pack", "unpack"]

#: Largest number of escapes in a section.
MAX_ESCAPES = 8_192

#: Largest number of escapes in a section for each of its coded tokens, on average.
MAX_TOKEN_ESCAPES = 32

#: Bytes of an escape before entropy coding: 4 of its gap, 2 of its value.
ESCAPE_BYTES = 6

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

    @cached_property
    def rows(self) -> dict[SymbolClass, slice]:
        """The rows of each class."""
        borders = accumulate(self.counts, initial=0)
        return {
            symbol_class: slice(*span)
            for symbol_class, span in zip(SymbolClass, pairwise(borders), strict=True)
        }

    @cached_property
    def limits(self) -> NDArray[np.int16]:
        """The largest magnitude that the class of each row holds: ``[stored, 1]``."""
        limits = np.array([symbol_class.limit for symbol_class in SymbolClass], dtype=np.int16)
        return limits.repeat(self.counts)[:, None]

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
        room = (CHUNK_BYTES - self.side_size(tokens)) // ESCAPE_BYTES
        return min(MAX_ESCAPES, MAX_TOKEN_ESCAPES * tokens, escapable, room)

    def payload_bounds(self, tokens: int) -> tuple[int, int]:
        """Return the least and the most bytes of a payload."""
        symbols = sum(self.class_sizes(tokens))
        most = self.side_size(tokens, self.max_escapes(tokens))
        return symbols + self.side_size(tokens), symbols + most

    def max_chunks(self, tokens: int) -> list[list[int]]:
        """Return the chunks of the largest payload; see `chunks`."""
        return self.chunks(tokens, self.payload_bounds(tokens)[1])

    def chunks(self, tokens: int, payload_size: int) -> list[list[int]]:
        """Return the runs of the chunks that the encoder cuts a payload of this size into.

        Escapes make the first chunk larger; their planes are runs, those that are nearly zero in one.
        """
        escapes = (payload_size - self.payload_bounds(tokens)[0]) // ESCAPE_BYTES
        planes = (self.side_size(tokens), escapes, escapes, (ESCAPE_BYTES - 2) * escapes)
        most = self.side_size(tokens, self.max_escapes(tokens))
        first, *rest = cut_symbols(self.counts, tokens, most)
        return [[run for run in planes if run] + list(first), *map(list, rest)]


def pack(section: RdSection, layout: RdLayout) -> NDArray[np.uint8]:
    """Return the payload of a section.

    Raises
    ------
    EncodeRangeError
        If it has too many escapes: the KV is too unlike what the plan was made for.
    """
    tokens, limits = section.levels.size, layout.limits
    clamped = np.maximum(section.symbols, -limits)
    np.minimum(clamped, limits, out=clamped)
    indices = np.flatnonzero(clamped != section.symbols)
    if indices.size > layout.max_escapes(tokens):
        raise EncodeRangeError(
            f"{indices.size} of the block's symbols are beyond their classes, the format holds "
            f"{layout.max_escapes(tokens)}; keep this block raw, and recalibrate if it happens often"
        )
    side = _pack_side(section.levels, indices, section.symbols.reshape(-1)[indices])
    regions = [pack_rows(clamped[rows], symbol_class) for symbol_class, rows in layout.rows.items()]
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
    for (symbol_class, rows), size in zip(layout.rows.items(), sizes, strict=True):
        unpack_rows(payload[offset : offset + size], symbol_class, symbols[rows])
        offset += size
    if escapes:
        _restore(symbols, layout, payload[layout.side_size(tokens) : side_size])
    return RdSection(levels, symbols)


# --- side data -----------------------------------------------------------------------------------


def _pack_side(
    levels: NDArray[np.int8], indices: NDArray[np.int64], values: NDArray[np.int16]
) -> NDArray[np.uint8]:
    count = np.array([indices.size], dtype="<u4").view(np.uint8)
    nibbles = np.zeros(levels.size + levels.size % 2, dtype=np.uint8)
    nibbles[: levels.size] = levels - MIN_LEVEL
    packed_levels = nibbles[0::2] | nibbles[1::2] << 4
    # Gaps and magnitudes are small numbers, so their planes of high bytes are mostly zeros.
    gaps = _planes(np.diff(indices, prepend=-1) - 1, "<u4")
    wide = values.astype(np.int32)
    zigzag = _planes(wide << 1 ^ wide >> 31, "<u2")  # 2 q, or -2 q - 1 below 0
    return np.concatenate([count, packed_levels, gaps[0], zigzag[0], gaps[1:].reshape(-1), zigzag[1]])


def _planes(numbers: NDArray[np.signedinteger], dtype: str) -> NDArray[np.uint8]:
    """Return the bytes of numbers, the lowest of all first: ``[bytes, numbers]``."""
    data = numbers.astype(dtype)
    planes: NDArray[np.uint8] = data.view(np.uint8).reshape(data.size, data.itemsize).T
    return planes


def _unpack_levels(data: NDArray[np.uint8], tokens: int) -> NDArray[np.int8]:
    nibbles = np.stack([data & 0xF, data >> 4], axis=1).reshape(-1)
    if nibbles[tokens:].any():
        raise ReservedBitsError("the padding behind the last token's level is not 0; drop the stream")
    levels: NDArray[np.int8] = nibbles[:tokens].astype(np.int8) + np.int8(MIN_LEVEL)
    return levels


def _restore(symbols: NDArray[np.int16], layout: RdLayout, data: NDArray[np.uint8]) -> None:
    """Put escapes in the place of their clamped symbols."""
    escapes = data.size // ESCAPE_BYTES
    planes = data.reshape(ESCAPE_BYTES, escapes).astype(np.int64)
    gaps = planes[0] | planes[2] << 8 | planes[3] << 16 | planes[4] << 24
    zigzag = planes[1] | planes[5] << 8
    indices = np.cumsum(gaps + 1) - 1
    if indices[-1] >= symbols.size:
        raise PayloadError("an escape lies behind the last symbol; drop the stream")
    values = zigzag >> 1 ^ -(zigzag & 1)
    limit = layout.limits[indices // symbols.shape[1], 0]
    flat, magnitudes = symbols.reshape(-1), np.abs(values)
    in_range = (limit < magnitudes) & (magnitudes <= SymbolClass.WIDE.limit)
    if not (in_range & (values.clip(-limit, limit) == flat[indices])).all():
        raise PayloadError("an escape does not agree with its class or its clamped symbol; drop the stream")
    flat[indices] = values
