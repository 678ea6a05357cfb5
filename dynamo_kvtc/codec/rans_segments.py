"""Where a chunk of the rANS coder changes its frequencies: as often as another table pays."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from dynamo_kvtc.codec.rans_tables import table_bytes

__all__ = ["LANES", "MAX_SEGMENTS", "segment_steps"]

#: Bytes of a step: each lane codes one.
LANES = 32

#: Tables that a chunk may have.
MAX_SEGMENTS = 16

#: Steps between the places where segments may begin, beside the borders of runs.
_GRID = 64

_MAX_PLAIN = 65_536


def segment_steps(plain: NDArray[np.uint8], runs: Sequence[int]) -> list[int]:
    """Return the steps of each segment with which a chunk takes the fewest bytes, tables included.

    Parameters
    ----------
    plain : NDArray[np.uint8]
        ``[bytes]``, at least one.
    runs : Sequence[int]
        Bytes of runs of alike statistics: segments may begin there, at the nearest step, and every so
        many steps.
    """
    steps = -(-plain.size // LANES)
    ends = np.rint(np.cumsum(runs) / LANES).astype(np.int64)
    borders = np.union1d(np.arange(0, steps, _GRID), ends[(ends > 0) & (ends < steps)]).astype(np.int64)
    starts = borders * LANES
    pieces = np.split(plain, starts[1:])
    counts = np.array([np.bincount(piece, minlength=256) for piece in pieces], dtype=np.int64)
    return _merge(counts, np.diff(np.append(borders, steps)))


def _merge(counts: NDArray[np.int64], steps: NDArray[np.int64]) -> list[int]:
    """Join neighbouring pieces to the segments that take the fewest bytes in all."""
    pieces = len(counts)
    sums = np.concatenate([np.zeros((1, 256), dtype=np.int64), np.cumsum(counts, axis=0)])
    # least[k, j]: bytes of the first j pieces in k segments; before[k, j]: where the last of them begins.
    least = np.full((MAX_SEGMENTS + 1, pieces + 1), np.inf)
    least[0, 0] = 0.0
    before = np.zeros(least.shape, dtype=np.int64)
    for stop in range(1, pieces + 1):
        own = sums[stop] - sums[:stop]
        cost = _entropy_bytes(own) + table_bytes(own) + 2.0
        total = least[:-1, :stop] + cost
        before[1:, stop] = total.argmin(axis=1)
        least[1:, stop] = total.min(axis=1)
    found: list[int] = []
    stop = pieces
    for number in range(int(least[:, pieces].argmin()), 0, -1):
        start = int(before[number, stop])
        found.insert(0, int(steps[start:stop].sum()))
        stop = start
    return found


def _entropy_bytes(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the order-0 entropy in bytes of symbols that occur so often: ``[…]`` of ``[…, 256]``."""
    table = _x_log_x()
    found: NDArray[np.float64] = (table[counts.sum(axis=-1)] - table[counts].sum(axis=-1)) / 8.0
    return found


@cache
def _x_log_x() -> NDArray[np.float64]:
    numbers = np.arange(_MAX_PLAIN + 1, dtype=np.float64)
    numbers[1:] *= np.log2(numbers[1:])
    return numbers
