"""A byte-range allocator for variable-size pieces of one region: best fit, with coalescing.

Keeps the free ranges only; whoever allocates remembers what it got.
"""

from __future__ import annotations

from bisect import bisect_left, insort

__all__ = ["RangeAllocator"]


class RangeAllocator:
    """Hands out ranges of ``[0, capacity)``, each start and size a multiple of `alignment`.

    Best fit: the smallest free range that is large enough, the lowest of equals. Neighbouring free
    ranges are always merged, so freeing everything leaves one range. Not thread-safe.

    Parameters
    ----------
    capacity : int
        Bytes; rounded down to the alignment.
    alignment : int
        A power of two.

    Raises
    ------
    ValueError
        If the alignment is none, or the capacity smaller than it.
    """

    def __init__(self, capacity: int, alignment: int = 64) -> None:
        if alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"alignment must be a power of two, not {alignment}")
        self.alignment = alignment
        self.capacity = capacity - capacity % alignment
        if self.capacity < alignment:
            raise ValueError(f"a capacity of {capacity} bytes holds nothing at an alignment of {alignment}")
        self._size_at: dict[int, int] = {}
        self._start_by_end: dict[int, int] = {}
        self._by_size: list[tuple[int, int]] = []
        self.free_bytes = 0
        self._insert(0, self.capacity)

    @property
    def allocated_bytes(self) -> int:
        """Bytes handed out, rounding included."""
        return self.capacity - self.free_bytes

    @property
    def largest_free_bytes(self) -> int:
        """The largest size that can be allocated now."""
        return self._by_size[-1][0] if self._by_size else 0

    @property
    def fragmentation(self) -> float:
        """Share of the free bytes outside the largest free range: 0 is none, towards 1 is bad."""
        return 1.0 - self.largest_free_bytes / self.free_bytes if self.free_bytes else 0.0

    def rounded(self, nbytes: int) -> int:
        """Return the bytes that an allocation of `nbytes` takes."""
        return -(-nbytes // self.alignment) * self.alignment

    def allocate(self, nbytes: int) -> int | None:
        """Return the start of a free range of `nbytes` (1 or more) bytes, or None if none is large enough."""
        if nbytes < 1:
            raise ValueError(f"cannot allocate {nbytes} bytes")
        needed = self.rounded(nbytes)
        place = bisect_left(self._by_size, (needed, 0))
        if place == len(self._by_size):
            return None
        size, start = self._by_size[place]
        self._remove(start, size)
        if size > needed:
            self._insert(start + needed, size - needed)
        return start

    def free(self, start: int, nbytes: int) -> None:
        """Give back what ``allocate(nbytes)`` returned as `start`.

        Raises
        ------
        ValueError
            If the range is outside the region or visibly not allocated.
        """
        size = self.rounded(nbytes)
        if start < 0 or nbytes < 1 or start % self.alignment or start + size > self.capacity:
            raise ValueError(f"[{start}, {start + size}) is not a range of this allocator")
        if start in self._size_at or start + size in self._start_by_end:
            raise ValueError(f"[{start}, {start + size}) is free already")
        before = self._start_by_end.get(start)
        if before is not None:
            self._remove(before, start - before)
            start, size = before, size + start - before
        after = self._size_at.get(start + size)
        if after is not None:
            self._remove(start + size, after)
            size += after
        self._insert(start, size)

    def _insert(self, start: int, size: int) -> None:
        self._size_at[start] = size
        self._start_by_end[start + size] = start
        insort(self._by_size, (size, start))
        self.free_bytes += size

    def _remove(self, start: int, size: int) -> None:
        del self._size_at[start]
        del self._start_by_end[start + size]
        del self._by_size[bisect_left(self._by_size, (size, start))]
        self.free_bytes -= size
