"""Which tier blocks the tiers gained and lost, by sequence hash, for hosts that tell a router.

Keys are one-way, so an object can be named only once its sequence was seen here: when it is offloaded, or
when a lookup finds it. What an earlier process stored is announced by the first lookup that finds it.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from dynamo_kvtc.tiers.base import TierKey
from dynamo_kvtc.tiers.stack import TierStack

__all__ = ["EventLog", "TierEvent"]

#: Tier blocks whose names are remembered: about 200 bytes each.
_MOST_NAMES = 131_072

#: Events that may wait to be taken; older ones are lost then, and counted.
_MOST_EVENTS = 65_536


@dataclass(frozen=True, slots=True)
class TierEvent:
    """A tier block that a tier has stored or lost.

    Attributes
    ----------
    sequence_hash : bytes
        Of the tier block's last engine block.
    tier : str
        Name of the tier.
    stored : bool
        Whether it has come, or gone.
    """

    sequence_hash: bytes
    tier: str
    stored: bool


@dataclass(slots=True)
class _Named:
    sequence_hash: bytes
    #: Tiers that were said to hold it, as bits.
    announced: int = 0


class EventLog:
    """Collects events of the tiers of one stack. Lives on the stack's event loop; `take` is for any thread.

    Attributes
    ----------
    lost : int
        Events that nobody took in time.
    """

    def __init__(
        self, tiers: TierStack, *, most_names: int = _MOST_NAMES, most_events: int = _MOST_EVENTS
    ) -> None:
        self.lost = 0
        self._tiers = tiers.tiers
        self._most_names, self._most_events = most_names, most_events
        self._named: OrderedDict[TierKey, _Named] = OrderedDict()
        self._events: deque[TierEvent] = deque()
        for index, tier in enumerate(self._tiers):
            tier.watch(partial(self._changed, index))

    def name(self, keys: Sequence[TierKey], sequence_hashes: Sequence[bytes]) -> None:
        """Say which sequence hash each key stands for, before its object can come."""
        for key, sequence_hash in zip(keys, sequence_hashes, strict=True):
            if key in self._named:
                self._named.move_to_end(key)
            else:
                self._named[key] = _Named(sequence_hash)
        while len(self._named) > self._most_names:
            _, oldest = self._named.popitem(last=False)
            # What can no longer be followed is not promised any more.
            for index in range(len(self._tiers)):
                self._tell(oldest, index, stored=False)

    def found(self, keys: Sequence[TierKey], sequence_hashes: Sequence[bytes]) -> None:
        """Announce objects that a lookup found, unless they have been announced."""
        self.name(keys, sequence_hashes)
        for key in keys:
            if (named := self._named.get(key)) is not None:
                for index, tier in enumerate(self._tiers):
                    if tier.size_of(key) is not None:
                        self._tell(named, index, stored=True)

    def take(self) -> list[TierEvent]:
        """Return the events since the last call, oldest first."""
        taken = []
        while self._events:
            taken.append(self._events.popleft())
        return taken

    def _changed(self, index: int, key: TierKey, stored: bool) -> None:
        if (named := self._named.get(key)) is not None:
            self._tell(named, index, stored=stored)

    def _tell(self, named: _Named, index: int, *, stored: bool) -> None:
        bit = 1 << index
        if bool(named.announced & bit) == stored:
            return
        named.announced ^= bit
        if len(self._events) >= self._most_events:
            self._events.popleft()
            self.lost += 1
        self._events.append(TierEvent(named.sequence_hash, self._tiers[index].name, stored))
