"""Pairs of spans to NIXL's descriptor rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dynamo_kvtc.transfer.files import FileSpan
from dynamo_kvtc.transfer.memory import MemorySpan

__all__ = ["Span", "cut_pairs", "furthest_ends", "local_kind"]

Span = MemorySpan | FileSpan


def cut_pairs(
    pairs: Sequence[tuple[MemorySpan, Span]], max_bytes: int
) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Turn pairs of spans into descriptor rows of at most `max_bytes` each; empty spans vanish.

    Returns
    -------
    tuple
        Local and remote rows, uint64 ``[n, 3]``: address or file offset, bytes, device or descriptor.

    Raises
    ------
    ValueError
        If the spans of a pair differ in length.
    """
    local: list[tuple[int, int, int]] = []
    remote: list[tuple[int, int, int]] = []
    for near, far in pairs:
        if near.nbytes != far.nbytes:
            raise ValueError(f"cannot move {near.nbytes} bytes from or to a span of {far.nbytes}")
        near_start, near_device = _place(near)
        far_start, device = _place(far)
        for done in range(0, near.nbytes, max_bytes):
            size = min(max_bytes, near.nbytes - done)
            local.append((near_start + done, size, near_device))
            remote.append((far_start + done, size, device))
    return _rows(local), _rows(remote)


def local_kind(pairs: Sequence[tuple[MemorySpan, Span]]) -> str:
    """Return the kind of memory that all local spans are of; a `ValueError` if they are of several."""
    kinds = {near.region.kind for near, _ in pairs}
    if len(kinds) != 1:
        raise ValueError(f"one transfer moves one kind of local memory, not {sorted(kinds)}")
    return kinds.pop()


def furthest_ends(rows: NDArray[np.uint64]) -> dict[int, int]:
    """Return, by file descriptor, the end of the furthest range in file rows."""
    # Without numpy's `unique`, whose first call imports modules for a tenth of a second, on the event loop.
    ends: dict[int, int] = {}
    for offset, nbytes, fd in rows.tolist():
        ends[fd] = max(ends.get(fd, 0), offset + nbytes)
    return ends


def _place(span: Span) -> tuple[int, int]:
    if isinstance(span, FileSpan):
        return span.offset, span.region.fd
    return span.address, span.region.device


def _rows(rows: list[tuple[int, int, int]]) -> NDArray[np.uint64]:
    return np.array(rows, dtype=np.uint64).reshape(-1, 3)
