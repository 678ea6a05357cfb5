"""Which objects are worth writing to a tier that wears: those asked for again, within a budget of bytes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from dynamo_kvtc.errors import ConfigError

__all__ = ["Admission", "FrequencySketch", "TokenBucket"]

_DAY_S = 86_400.0
_ROWS = 4
_MOST = 15
_HALVED = bytes(value // 2 for value in range(256))


class FrequencySketch:
    """How often keys were seen lately, in a fixed amount of memory.

    A count-min sketch: four counters for each key, of which the smallest counts; it may count too high, never
    too low before counters are halved, which happens every ``8 * width`` sightings.

    Parameters
    ----------
    width : int
        Counters of each of the four rows, one byte each; at least 1.
    """

    def __init__(self, width: int = 1 << 16) -> None:
        if width < 1:
            raise ConfigError("a sketch needs at least one counter")
        self._rows = [bytearray(width) for _ in range(_ROWS)]
        self._width, self._sightings = width, 0

    def see(self, key: bytes) -> None:
        """Count a sighting of a key, whose bytes are those of a hash."""
        for row, place in zip(self._rows, self._places(key), strict=True):
            row[place] = min(_MOST, row[place] + 1)
        self._sightings += 1
        if self._sightings >= 8 * self._width:
            self._sightings = 0
            self._rows = [bytearray(row.translate(_HALVED)) for row in self._rows]

    def count(self, key: bytes) -> int:
        """Return about how often a key was seen, 15 at the most."""
        return min(row[place] for row, place in zip(self._rows, self._places(key), strict=True))

    def _places(self, key: bytes) -> list[int]:
        return [int.from_bytes(key[4 * row : 4 * row + 4], "little") % self._width for row in range(_ROWS)]


class TokenBucket:
    """Bytes that may be written, refilled evenly over the day; an hour's worth may be saved up.

    Parameters
    ----------
    bytes_per_day : int
        At least 1.
    clock : Callable
        Seconds, never going back.
    """

    def __init__(self, bytes_per_day: int, clock: Callable[[], float] = time.monotonic) -> None:
        if bytes_per_day < 1:
            raise ConfigError(f"a write budget of {bytes_per_day} bytes a day is none")
        self._rate, self._burst = bytes_per_day / _DAY_S, bytes_per_day / 24
        self._left, self._clock, self._then = self._burst, clock, clock()

    def take(self, nbytes: int) -> bool:
        """Take bytes out if any are left; one object may go into debt, so that large ones come through."""
        now = self._clock()
        self._left = min(self._burst, self._left + (now - self._then) * self._rate)
        self._then = now
        if self._left <= 0:
            return False
        self._left -= nbytes
        return True


class Admission:
    """The gate in front of a tier. Belongs to one event loop.

    Parameters
    ----------
    admit_after : int
        In how many lookups a tier block must have been asked for; 0 lets everything in.
    bytes_per_day : int, optional
        Write budget; None is none.

    Raises
    ------
    ConfigError
        If a number is out of range.
    """

    def __init__(
        self,
        admit_after: int = 0,
        bytes_per_day: int | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 0 <= admit_after <= _MOST:
            raise ConfigError(f"admit_after is {admit_after}; it lies within 0 and {_MOST}")
        self._admit_after = admit_after
        self._sketch = FrequencySketch() if admit_after else None
        self._bucket = None if bytes_per_day is None else TokenBucket(bytes_per_day, clock)
        self.refused = {"frequency": 0, "budget": 0}

    def see(self, keys: Iterable[bytes]) -> None:
        """Take in that tier blocks were asked for."""
        if self._sketch is not None:
            for key in keys:
                self._sketch.see(key)

    def is_frequent(self, key: bytes) -> bool:
        """Tell whether a tier block has been asked for often enough."""
        return self._sketch is None or self._sketch.count(key) >= self._admit_after

    def admits(self, key: bytes, nbytes: int) -> bool:
        """Decide about an object that is about to be written; an admitted one is charged to the budget."""
        if not self.is_frequent(key):
            self.refused["frequency"] += 1
            return False
        if self._bucket is not None and not self._bucket.take(nbytes):
            self.refused["budget"] += 1
            return False
        return True
