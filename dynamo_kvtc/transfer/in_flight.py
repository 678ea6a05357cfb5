"""Which buffers transfers in flight may touch, and who waits for that to end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dynamo_kvtc.transfer.descriptors import Span
from dynamo_kvtc.transfer.files import FileRegion
from dynamo_kvtc.transfer.memory import MemoryRegion
from dynamo_kvtc.transfer.owner import Transfer

__all__ = ["InFlight"]


@dataclass(eq=False, slots=True)
class _Flight:
    spans: tuple[Span, ...]
    abandoned: bool = False
    callbacks: list[Callable[[], object]] = field(default_factory=list)


class InFlight:
    """The transfers in flight and their buffers. Lives on the agent's loop.

    A transfer whose caller was cancelled or timed out is abandoned: its buffers are parked until it has
    drained.
    """

    def __init__(self) -> None:
        self._flights: dict[Transfer, _Flight] = {}
        self.parked = 0

    def __len__(self) -> int:
        return len(self._flights)

    def __contains__(self, transfer: Transfer) -> bool:
        return transfer in self._flights

    def add(self, transfer: Transfer, spans: Sequence[Span]) -> None:
        """Take note that a transfer may touch `spans` from now on."""
        self._flights[transfer] = _Flight(tuple(spans))

    def abandon(self, transfer: Transfer) -> None:
        """Park the buffers of a transfer that nobody awaits any more."""
        self._flights[transfer].abandoned = True
        self.parked += 1

    def end(self, transfer: Transfer) -> bool:
        """Free the buffers of a transfer that has ended; returns whether it had been abandoned."""
        flight = self._flights.pop(transfer)
        self.parked -= flight.abandoned
        for callback in flight.callbacks:
            callback()
        return flight.abandoned

    def on_drained(self, what: Span | MemoryRegion | FileRegion, callback: Callable[[], object]) -> None:
        """Call `callback` once no transfer can touch `what` any more; at once if none can.

        For a span only abandoned transfers count: who holds the span awaits the others. For a region all do.
        """
        waiting_for = [flight for flight in self._flights.values() if _touches(flight, what)]
        if not waiting_for:
            callback()
            return
        remaining = len(waiting_for)

        def one_ended() -> None:
            nonlocal remaining
            remaining -= 1
            if remaining == 0:
                callback()

        for flight in waiting_for:
            flight.callbacks.append(one_ended)


def _touches(flight: _Flight, what: Span | MemoryRegion | FileRegion) -> bool:
    if isinstance(what, (MemoryRegion, FileRegion)):
        return any(span.region is what for span in flight.spans)
    start, stop = what.offset, what.offset + what.nbytes
    return flight.abandoned and any(
        span.region is what.region and span.offset < stop and start < span.offset + span.nbytes
        for span in flight.spans
    )
