"""The index of a tier: where each object lies, in least-recently-used order.

Compact, because a tier may hold millions of objects: one dict from key to slot, columns of machine
integers for everything else, and the order as a doubly linked list over two of these columns.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dynamo_kvtc.tiers.base import TierKey

__all__ = ["Location", "ObjectIndex"]

# Slot 0 is the list's sentinel: its next is the least, its previous the most recently used object.
_SENTINEL = 0


class Location(NamedTuple):
    """Where an object's bytes lie.

    Attributes
    ----------
    segment : int
        Number of the segment; 0 in tiers that have only one.
    offset, nbytes : int
        The object's bytes within the segment.
    checksum : int
        XXH3-64 of the object's bytes; 0 in tiers that do not keep it.
    """

    segment: int
    offset: int
    nbytes: int
    checksum: int = 0


class ObjectIndex:
    """Maps keys to locations, in least-recently-used order. Not thread-safe.

    Every operation takes constant time, the growth of the columns aside.
    """

    def __init__(self) -> None:
        self._slots: dict[TierKey, int] = {}
        self._keys: list[TierKey | None] = [None]
        self._segments = array("I", [0])
        self._offsets = array("Q", [0])
        self._sizes = array("Q", [0])
        self._checksums = array("Q", [0])
        self._spared = array("B", [0])
        self._previous = array("I", [_SENTINEL])
        self._next = array("I", [_SENTINEL])
        self._free_slots = array("I")
        self.stored_bytes = 0

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, key: TierKey) -> bool:
        return key in self._slots

    def get(self, key: TierKey) -> Location | None:
        """Return where an object lies, or None; does not touch it."""
        slot = self._slots.get(key)
        return None if slot is None else self._location(slot)

    def size_of(self, key: TierKey) -> int | None:
        """Return an object's size in bytes, or None; does not touch it."""
        slot = self._slots.get(key)
        return None if slot is None else self._sizes[slot]

    def add(self, key: TierKey, location: Location) -> None:
        """Add an object as the most recently used one.

        Raises
        ------
        KeyError
            If the key is present already.
        """
        if key in self._slots:
            raise KeyError(f"{key.hex()} is in the index already")
        if self._free_slots:
            slot = self._free_slots.pop()
            self._keys[slot] = key
            self._segments[slot] = location.segment
            self._offsets[slot] = location.offset
            self._sizes[slot] = location.nbytes
            self._checksums[slot] = location.checksum
            self._spared[slot] = 0
        else:
            slot = len(self._keys)
            self._keys.append(key)
            self._segments.append(location.segment)
            self._offsets.append(location.offset)
            self._sizes.append(location.nbytes)
            self._checksums.append(location.checksum)
            self._spared.append(0)
            self._previous.append(_SENTINEL)
            self._next.append(_SENTINEL)
        self._slots[key] = slot
        self._link_last(slot)
        self.stored_bytes += location.nbytes

    def remove(self, key: TierKey) -> Location:
        """Remove an object and return where it lay.

        Raises
        ------
        KeyError
            If the key is not present.
        """
        slot = self._slots.pop(key)
        location = self._location(slot)
        self._unlink(slot)
        self._keys[slot] = None
        self._free_slots.append(slot)
        self.stored_bytes -= location.nbytes
        return location

    def touch(self, key: TierKey) -> None:
        """Make an object the most recently used one."""
        slot = self._slots[key]
        self._unlink(slot)
        self._link_last(slot)

    def touch_prefix(self, keys: Sequence[TierKey]) -> int:
        """Touch the leading `keys` that are present and return how many they are.

        They are touched from the last to the first: of a prefix, the far end is evicted before the
        beginning, without which the rest is useless.
        """
        slots = []
        for key in keys:
            slot = self._slots.get(key)
            if slot is None:
                break
            slots.append(slot)
        for slot in reversed(slots):
            self._unlink(slot)
            self._link_last(slot)
        return len(slots)

    def prefer(self, key: TierKey, times: int) -> None:
        """Let `spare` save an object so many times (0 to 255), whatever it was before."""
        self._spared[self._slots[key]] = times

    def spare(self, key: TierKey) -> bool:
        """Touch an object that is preferred and count it once less; returns False for all others."""
        slot = self._slots[key]
        if not self._spared[slot]:
            return False
        self._spared[slot] -= 1
        self.touch(key)
        return True

    def oldest_first(self) -> Iterator[TierKey]:
        """Iterate over the keys, least recently used first; the key just given may be removed."""
        slot = self._next[_SENTINEL]
        while slot != _SENTINEL:
            following = self._next[slot]
            key = self._keys[slot]
            assert key is not None
            yield key
            slot = following

    def _location(self, slot: int) -> Location:
        return Location(self._segments[slot], self._offsets[slot], self._sizes[slot], self._checksums[slot])

    def _unlink(self, slot: int) -> None:
        before, after = self._previous[slot], self._next[slot]
        self._next[before] = after
        self._previous[after] = before

    def _link_last(self, slot: int) -> None:
        last = self._previous[_SENTINEL]
        self._next[last] = slot
        self._previous[slot] = last
        self._next[slot] = _SENTINEL
        self._previous[_SENTINEL] = slot
