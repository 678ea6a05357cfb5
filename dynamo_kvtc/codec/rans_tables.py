"""Frequency tables of the rANS coder: chosen, written and read (`docs/bitstream.md`, section 4.1).

A table gives each symbol that occurs one of 15 levels; frequencies follow from these in integers. Against
exact frequencies that costs .2 % of the coded bytes and saves a third of the tables (`docs/science.md`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynamo_kvtc.errors import EntropyDecodeError

__all__ = ["MAX_TABLE_BYTES", "TOTAL", "TOTAL_BITS", "choose_levels", "frequencies_of", "pack_table",
           "read_table", "table_bytes"]  # fmt: skip

#: What the frequencies of a table add up to.
TOTAL_BITS = 12
TOTAL = 1 << TOTAL_BITS

#: Bytes of a table in which every symbol occurs.
MAX_TABLE_BYTES = 2 + 32 + 128

_SYMBOLS = 256
_ROW = 16

#: Weight of each level. Level 0 is of symbols that do not occur; 2 to 15 grow from 1 to 512 in equal ratios.
_WEIGHTS = np.array([0, 0, 1, 2, 3, 4, 7, 11, 18, 29, 46, 75, 121, 196, 317, 512], dtype=np.int64)

#: 2**24 over what the largest frequency weighs: the largest weight, or up to almost a level less.
_SCALES = np.rint(2.0**24 / 512 * 512.0 ** (np.arange(4) / 52.0)).astype(np.int64)


def choose_levels(counts: NDArray[np.integer[Any]]) -> NDArray[np.uint8]:
    """Return the levels of symbols that occur so often: ``[256]``, 0 for those that do not.

    All in integers: a GPU (`kernels/rans_write_table.py`) and any CPU choose the same.

    Parameters
    ----------
    counts : NDArray
        ``[256]``, at least one of them not 0, adding up to 65,536 at most.
    """
    own = counts.astype(np.int64)
    total = own.sum()
    # What each level stands for, in occurrences times 4,096: one slot, and its share of the others.
    spare = np.maximum(TOTAL * own.max() - total, total // 2)
    reached = total + (_WEIGHTS[1:] * spare * _SCALES[:, None] >> 24)
    # The nearest in ratio, for each scale; below 2**60.
    passed = (TOTAL * own[:, None]) ** 2 > (reached[:, 1:] * reached[:, :-1])[:, None, :]
    levels = np.where(own > 0, 1 + passed.sum(axis=2), 0).astype(np.uint8)
    saved = _log2(np.maximum(frequencies_of(levels), 1)) @ own
    best: NDArray[np.uint8] = levels[int(saved.argmax())]
    return best


def _log2(frequencies: NDArray[np.uint32]) -> NDArray[np.int64]:
    """Return 4,096 times the logarithms of 1 to `TOTAL`, to .01: in integers, as they are everywhere."""
    exponents = (frequencies[..., None] >= 1 << np.arange(1, TOTAL_BITS + 1)).sum(axis=-1)
    rest = (frequencies.astype(np.int64) << TOTAL_BITS >> exponents) - TOTAL
    found: NDArray[np.int64] = (exponents << TOTAL_BITS) + rest + (rest * (TOTAL - rest) * 1407 >> 24)
    return found


def frequencies_of(levels: NDArray[np.uint8]) -> NDArray[np.uint32]:
    """Return the frequencies that levels stand for, which add up to `TOTAL`: ``[…, 256]``.

    Parameters
    ----------
    levels : NDArray[np.uint8]
        ``[…, 256]``; in each table a level beyond 1 occurs.
    """
    occurs = levels > 0
    weights = np.cumsum(_WEIGHTS[levels], axis=-1)
    spare = TOTAL - occurs.sum(axis=-1, keepdims=True)
    ends = np.cumsum(occurs, axis=-1) + weights * spare // weights[..., -1:]
    found: NDArray[np.uint32] = np.diff(ends, axis=-1, prepend=0).astype(np.uint32)
    return found


def table_bytes(counts: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
    """Return how many bytes tables of such counts take, padding aside: ``[…]`` of ``[…, 256]``."""
    occurs = counts > 0
    rows = occurs.reshape(*counts.shape[:-1], _SYMBOLS // _ROW, _ROW).any(axis=-1).sum(axis=-1)
    found: NDArray[np.float64] = 2.0 + 2.0 * rows + occurs.sum(axis=-1) / 2.0
    return found


def pack_table(levels: NDArray[np.uint8]) -> bytes:
    """Return the bytes of a table of some levels ``[256]``: an even number of them."""
    masks = np.packbits((levels > 0).reshape(-1, _ROW), axis=1, bitorder="little").view("<u2")[:, 0]
    rows = np.packbits(masks > 0, bitorder="little")
    own = levels[levels > 0]
    nibbles = np.append(own, np.zeros(own.size % 2, dtype=np.uint8)).reshape(-1, 2)
    packed = rows.tobytes() + masks[masks > 0].tobytes() + (nibbles[:, 0] | nibbles[:, 1] << 4).tobytes()
    return packed + bytes(len(packed) % 2)


def read_table(data: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], int]:
    """Return the levels of the table that some bytes begin with, ``[256]``, and how many bytes it takes.

    Raises
    ------
    EntropyDecodeError
        If the bytes are no table: too few, levels that cannot be, or padding that is not 0.
    """
    rows = np.flatnonzero(np.unpackbits(data[:2], bitorder="little"))
    at = 2 + 2 * rows.size
    if data.size < at:
        raise EntropyDecodeError("a frequency table is cut off; drop the stream")
    occurs = np.unpackbits(data[2:at], bitorder="little").reshape(-1, _ROW)
    symbols = (rows[:, None] * _ROW + np.arange(_ROW))[occurs > 0]
    stop = at + (symbols.size + 1) // 2
    end = stop + stop % 2
    if data.size < end:
        raise EntropyDecodeError("a frequency table is cut off; drop the stream")
    nibbles = np.stack([data[at:stop] & 15, data[at:stop] >> 4], axis=1).reshape(-1)
    own, padding = nibbles[: symbols.size], nibbles[symbols.size :]
    sound = occurs.any(axis=1).all() and own.all() and not padding.any() and not data[stop:end].any()
    if not (sound and (own > 1).any()):
        raise EntropyDecodeError("a frequency table has levels or padding that no encoder writes")
    levels = np.zeros(_SYMBOLS, dtype=np.uint8)
    levels[symbols] = own
    return levels, end
