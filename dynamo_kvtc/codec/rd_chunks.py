"""How the symbols of one section of the rd profile are cut: into chunks, and those into runs.

Chunks are units of storage and of decoding. A run is what the entropy coder gives a code of its own: it
should hold components of alike rate, but long enough to pay for the code.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from math import isqrt
from typing import NamedTuple

from dynamo_kvtc.codec.rd_plan import SymbolClass
from dynamo_kvtc.codec.rd_rows import row_bytes

__all__ = ["CHUNK_BYTES", "cut_symbols"]

#: Most bytes of a chunk.
CHUNK_BYTES = 65_536

#: Bytes for each square root of a token that chunks are filled by.
_PIECE_BYTES = 400

#: Components of a run, for each square root of a component before it and inverse one of a token.
_RUN_COMPONENTS = 70

#: Components that those before a run are counted from, so that the first runs are not too short.
_FIRST_COMPONENT = 4

#: Most bytes of a piece, and of a run of several components.
_MOST_BYTES = CHUNK_BYTES // 4

#: A region smaller than this shares a piece or run with the next one.
_LEAST_BYTES = 256


class _Region(NamedTuple):
    """Bytes ``start`` to ``stop`` of the symbols, of components of one class from `component` on."""

    start: int
    stop: int
    row_bytes: int
    component: int


@lru_cache(maxsize=1024)
def cut_symbols(counts: tuple[int, ...], tokens: int, before: int) -> tuple[tuple[int, ...], ...]:
    """Cut the symbols of a section.

    Parameters
    ----------
    counts : tuple[int, ...]
        Components of each `SymbolClass`.
    before : int
        Most bytes that come before the symbols, in the first chunk.

    Returns
    -------
    tuple[tuple[int, ...], ...]
        Sizes of the runs of each chunk, none of them 0; the first chunk may have none.
    """
    regions = _regions(counts, tokens)
    chunks = _fill([before, *_pieces([region.stop - region.start for region in regions], tokens)])
    borders = [stop - before for stop in accumulate(chunks)]
    return tuple(
        tuple(_runs(regions, tokens, start, stop))
        for start, stop in zip([0, *borders], borders, strict=False)
    )


def _regions(counts: tuple[int, ...], tokens: int) -> list[_Region]:
    """Return the regions of symbols in the payload's order."""
    regions: list[_Region] = []
    start = 0
    # WIDE components have two regions, one for each byte of a symbol.
    for symbol_class in (SymbolClass.WIDE, *SymbolClass):
        size = tokens if symbol_class is SymbolClass.WIDE else row_bytes(symbol_class, tokens)
        stop = start + counts[symbol_class] * size
        regions.append(_Region(start, stop, size, sum(counts[:symbol_class])))
        start = stop
    return regions


def _pieces(sizes: Sequence[int], tokens: int) -> list[int]:
    """Cut regions of some sizes into even pieces, by which chunks are filled."""
    target = min(_PIECE_BYTES * isqrt(tokens), _MOST_BYTES)
    pieces: list[int] = []
    pending = 0
    for size in sizes:
        pending += size
        if pending >= _LEAST_BYTES:
            count = max(1, round(pending / target))
            pieces += [pending * (i + 1) // count - pending * i // count for i in range(count)]
            pending = 0
    return pieces + [pending] * bool(pending)


def _fill(pieces: Sequence[int]) -> list[int]:
    """Join pieces to chunks that are as long as they may be; return their sizes."""
    chunks = [0]
    for piece in pieces:
        if chunks[-1] + piece > CHUNK_BYTES:
            chunks.append(0)
        chunks[-1] += piece
    return chunks


def _runs(regions: Sequence[_Region], tokens: int, start: int, stop: int) -> list[int]:
    """Cut the symbols of one chunk, bytes `start` to `stop`, into runs.

    Rates fall ever more slowly from one component to the next, so runs grow; the more tokens, the sooner
    a code is paid for (`docs/science.md`).
    """
    runs: list[int] = []
    pending = 0
    for region in regions:
        position, end = max(start, region.start), min(stop, region.stop)
        while position < end:
            component = region.component + (position - region.start) // region.row_bytes
            length = isqrt(_RUN_COMPONENTS**2 * (component + _FIRST_COMPONENT) // tokens)
            size = max(min(length * region.row_bytes, _MOST_BYTES), region.row_bytes)
            if 2 * (end - position) < 3 * size:
                size = end - position
            position += size
            pending += size
            if pending >= _LEAST_BYTES:
                runs.append(pending)
                pending = 0
    return runs + [pending] * bool(pending)
