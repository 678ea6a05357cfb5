"""Buffers of abandoned transfers: parked until NIXL has drained them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dynamo_kvtc.transfer.descriptors import Span
from dynamo_kvtc.transfer.files import FileRegion
from dynamo_kvtc.transfer.memory import MemoryRegion
from dynamo_kvtc.transfer.owner import Transfer

__all__ = ["ParkedBuffers"]


@dataclass(eq=False, slots=True)
class _Parked:
    spans: tuple[Span, ...]
    callbacks: list[Callable[[], object]] = field(default_factory=list)


class ParkedBuffers:
    """What abandoned transfers may still touch, and who waits for it. Lives on the agent's loop."""

    def __init__(self) -> None:
        self._parked: dict[Transfer, _Parked] = {}

    def __len__(self) -> int:
        return len(self._parked)

    def __contains__(self, transfer: Transfer) -> bool:
        return transfer in self._parked

    def park(self, transfer: Transfer, spans: Sequence[Span]) -> None:
        """Take note that an abandoned transfer may still touch `spans`."""
        self._parked[transfer] = _Parked(tuple(spans))

    def drained(self, transfer: Transfer) -> bool:
        """Free what a transfer had parked; returns whether it was parked at all."""
        parked = self._parked.pop(transfer, None)
        if parked is None:
            return False
        for callback in parked.callbacks:
            callback()
        return True

    def on_drained(self, what: Span | MemoryRegion | FileRegion, callback: Callable[[], object]) -> None:
        """Call `callback` once nothing parked overlaps `what`; at once if nothing does."""
        waiting_for = [parked for parked in self._parked.values() if _touches(parked.spans, what)]
        if not waiting_for:
            callback()
            return
        remaining = len(waiting_for)

        def one_drained() -> None:
            nonlocal remaining
            remaining -= 1
            if remaining == 0:
                callback()

        for parked in waiting_for:
            parked.callbacks.append(one_drained)


def _touches(spans: Sequence[Span], what: Span | MemoryRegion | FileRegion) -> bool:
    if isinstance(what, (MemoryRegion, FileRegion)):
        return any(span.region is what for span in spans)
    start, stop = what.offset, what.offset + what.nbytes
    return any(
        span.region is what.region and span.offset < stop and start < span.offset + span.nbytes
        for span in spans
    )
