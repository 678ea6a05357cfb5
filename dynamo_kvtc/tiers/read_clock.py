"""How fast a tier is read, when reads overlap."""

from __future__ import annotations

import time

__all__ = ["ReadClock"]


class ReadClock:
    """Bytes of a tier's reads against the time in which at least one of them was under way."""

    def __init__(self) -> None:
        self._active, self._nbytes, self._since = 0, 0, 0.0

    def start(self) -> None:
        """Begin a read."""
        if not self._active:
            self._since = time.perf_counter()
        self._active += 1

    def stop(self, nbytes: int) -> tuple[int, float] | None:
        """End a read of `nbytes` bytes; returns bytes and seconds if no other is under way."""
        self._active -= 1
        self._nbytes += nbytes
        if self._active:
            return None
        nbytes, self._nbytes = self._nbytes, 0
        return nbytes, time.perf_counter() - self._since
