"""Symbols and side data of one section to its payload's bytes and back.

A payload is five regions: the high bytes of the side data, its low bytes, FP8, INT4 and INT2 symbols;
bytes of a kind lie together because entropy coders need peaked statistics. Every size follows from the
plan and the number of tokens, so all are known before anything is encoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dynamo_kvtc.codec.plan import QuantType
from dynamo_kvtc.codec.quantiser import STORED_TYPES, PlanQuantiser, QuantisedSection
from dynamo_kvtc.errors import ChunkTableError, PayloadError, ReservedBitsError

__all__ = ["CHUNK_BYTES", "MIN_CHUNK_BYTES", "SectionLayout", "cut", "pack", "unpack"]

#: Largest plain chunk that is cut.
CHUNK_BYTES = 65_536

#: Regions smaller than this share a chunk with their neighbours: below it, a chunk's own Huffman tables
#: and its row in the chunk table cost more than unmixed statistics gain.
MIN_CHUNK_BYTES = 2_048

_E4M3_NAN = 0x7F


@dataclass(frozen=True)
class SectionLayout:
    """Sizes of one section's payload.

    Attributes
    ----------
    num_groups : int
        Groups of the plan.
    counts : tuple[int, ...]
        Components of each of `STORED_TYPES`.
    """

    num_groups: int
    counts: tuple[int, ...]

    @classmethod
    def of(cls, quantiser: PlanQuantiser) -> SectionLayout:
        """Return the layout of what `quantiser` produces."""
        return cls(quantiser.num_groups, tuple(quantiser.counts[quant_type] for quant_type in STORED_TYPES))

    def region_sizes(self, tokens: int) -> tuple[int, ...]:
        """Return the bytes of the five regions, in order, for a section of `tokens` coded tokens."""
        plane = 2 * self.num_groups * tokens
        symbols = (
            count * _row_bytes(tokens, quant_type)
            for count, quant_type in zip(self.counts, STORED_TYPES, strict=True)
        )
        return (plane, plane, *symbols)

    def payload_size(self, tokens: int) -> int:
        """Return the bytes of the payload of `tokens` coded tokens."""
        return sum(self.region_sizes(tokens))

    def chunk_sizes(self, tokens: int) -> tuple[int, ...]:
        """Return the plain sizes of the chunks that the encoder cuts the payload into."""
        return cut(self.region_sizes(tokens))


def cut(regions: Sequence[int]) -> tuple[int, ...]:
    """Cut a payload into chunks at the borders of its regions where that does not make small pieces.

    Neighbouring regions are joined until they reach `MIN_CHUNK_BYTES`, the rest joins the last run, and
    each run is cut into the fewest nearly equal pieces of at most `CHUNK_BYTES`.

    Returns
    -------
    tuple[int, ...]
        Chunk sizes in bytes, none of them 0; empty for an empty payload.
    """
    runs: list[int] = []
    pending = 0
    for size in regions:
        pending += size
        if pending >= MIN_CHUNK_BYTES:
            runs.append(pending)
            pending = 0
    if runs:
        runs[-1] += pending
    elif pending:
        runs.append(pending)
    chunks: list[int] = []
    for run in runs:
        pieces = -(-run // CHUNK_BYTES)
        chunks += [run * (i + 1) // pieces - run * i // pieces for i in range(pieces)]
    return tuple(chunks)


def pack(section: QuantisedSection) -> NDArray[np.uint8]:
    """Return the payload of a quantised section: uint8 ``[layout.payload_size(tokens)]``."""
    side = section.side.numpy().astype("<f2", copy=False).reshape(-1).view(np.uint8).reshape(-1, 2)
    symbols = (_pack_rows(section.symbols[quant_type].numpy(), quant_type) for quant_type in STORED_TYPES)
    return np.concatenate([side[:, 1], side[:, 0], *(region.reshape(-1) for region in symbols)])


def unpack(payload: NDArray[np.uint8], layout: SectionLayout, tokens: int) -> QuantisedSection:
    """Return the quantised section that a payload holds; the inverse of `pack`.

    Raises
    ------
    ChunkTableError
        If the payload has another size than `layout` gives for `tokens`.
    ReservedBitsError
        If padding bits behind the last token are set.
    PayloadError
        If side data or FP8 symbols are NaN or infinite, which no encoder writes.
    """
    sizes = layout.region_sizes(tokens)
    if payload.size != sum(sizes):
        raise ChunkTableError(
            f"a section has {payload.size} payload bytes, its plan and tokens need {sum(sizes)}"
        )
    high, low, *regions = np.split(payload, np.cumsum(sizes)[:-1])
    side = np.empty((high.size, 2), dtype=np.uint8)
    side[:, 0], side[:, 1] = low, high
    halves = side.view("<f2").astype(np.float16, copy=False).reshape(2 * layout.num_groups, tokens)
    if not np.isfinite(halves).all():
        raise PayloadError("a section's side data holds NaN or infinity; drop the stream")
    symbols = {}
    for quant_type, count, region in zip(STORED_TYPES, layout.counts, regions, strict=True):
        rows = region.reshape(count, _row_bytes(tokens, quant_type))
        symbols[quant_type] = torch.from_numpy(_unpack_rows(rows, quant_type, tokens))
    if (symbols[QuantType.FP8] & _E4M3_NAN == _E4M3_NAN).any():
        raise PayloadError("a section's FP8 symbols hold NaN; drop the stream")
    return QuantisedSection(torch.from_numpy(halves), symbols)


def _row_bytes(tokens: int, quant_type: QuantType) -> int:
    """Bytes of one component's symbols."""
    return -(-tokens * quant_type.bits // 8)


def _pack_rows(symbols: NDArray[np.uint8], quant_type: QuantType) -> NDArray[np.uint8]:
    """Join the symbols of consecutive tokens in bytes, the first in the lowest bits."""
    bits, tokens = quant_type.bits, symbols.shape[1]
    if bits == 8:
        return symbols
    per_byte = 8 // bits
    padded = np.zeros((symbols.shape[0], _row_bytes(tokens, quant_type) * per_byte), dtype=np.uint8)
    padded[:, :tokens] = symbols
    words = padded.view(f"<u{per_byte}")
    # Symbol i of a byte sits 8 * i bits up in the word and belongs bits * i up in the byte.
    joined: NDArray[np.unsignedinteger] = words.copy()
    for i in range(1, per_byte):
        joined |= words >> words.dtype.type((8 - bits) * i)
    return joined.astype(np.uint8)


def _unpack_rows(packed: NDArray[np.uint8], quant_type: QuantType, tokens: int) -> NDArray[np.uint8]:
    """Undo `_pack_rows`: uint8 ``[components, tokens]``."""
    bits, components = quant_type.bits, packed.shape[0]
    if bits == 8:
        return packed.reshape(components, tokens)
    per_byte = 8 // bits
    wide = packed.astype(f"<u{per_byte}")
    words = wide.copy()
    for i in range(1, per_byte):
        words |= wide << wide.dtype.type((8 - bits) * i)
    words &= wide.dtype.type(int.from_bytes(bytes([2**bits - 1] * per_byte), "little"))
    symbols: NDArray[np.uint8] = words.view(np.uint8).reshape(components, words.shape[1] * per_byte)
    if symbols[:, tokens:].any():
        raise ReservedBitsError("padding bits behind the last token's symbols are set; drop the stream")
    return symbols[:, :tokens]
