"""Which chunks vLLM's KV events say are stored, and which of them are gone by now.

Tiers evict on their own. Instead of a hook in every tier, the chunks that were announced are looked at in
turn, a bounded number at a time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

from vllm.v1.kv_offload.base import OffloadingEvent, OffloadKey

__all__ = ["Announced"]

#: Chunks looked at in one call; each costs a dictionary access or two.
_CHECKED_AT_ONCE = 64


class Announced:
    """Events about stored and removed chunks.

    Parameters
    ----------
    make_event : Callable
        Makes an event from keys and whether they are gone.
    """

    def __init__(self, make_event: Callable[[list[OffloadKey], bool], OffloadingEvent]) -> None:
        self._make_event = make_event
        # In the order in which they are looked at next.
        self._keys: OrderedDict[OffloadKey, None] = OrderedDict()
        self._events: list[OffloadingEvent] = []

    def stored(self, keys: Iterable[OffloadKey]) -> None:
        """Announce chunks that were not announced yet."""
        new = [key for key in keys if key not in self._keys]
        if new:
            self._keys.update(dict.fromkeys(new))
            self._events.append(self._make_event(new, False))

    def check(self, holds: Callable[[OffloadKey], bool]) -> None:
        """Look at some announced chunks and announce those that are gone."""
        gone = []
        for _ in range(min(_CHECKED_AT_ONCE, len(self._keys))):
            key = next(iter(self._keys))
            if holds(key):
                self._keys.move_to_end(key)
            else:
                del self._keys[key]
                gone.append(key)
        if gone:
            self._events.append(self._make_event(gone, True))

    def take(self) -> list[OffloadingEvent]:
        """Return the events since the last call."""
        events, self._events = self._events, []
        return events
