"""What an offload call returns: when the engine may reuse its blocks, and what became of them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

__all__ = ["OffloadResult", "OffloadTicket"]


@dataclass(slots=True)
class OffloadResult:
    """What became of the tier blocks of one offload call."""

    stored: int = 0
    already_stored: int = 0  # or on its way by another call
    dropped: int = 0
    stored_bytes: int = 0


class OffloadTicket:
    """Handle of one offload call.

    `gathered` completes when the engine may reuse the blocks: their KV has been copied out, or will not
    be. `wait` completes when every tier block is stored or dropped. `is_gathered`, `is_finished` and `void`
    may be called from any thread.
    """

    def __init__(self, num_tier_blocks: int) -> None:
        loop = asyncio.get_running_loop()
        self.result = OffloadResult()
        self._to_gather = self._to_finish = num_tier_blocks
        self._void = False
        self._gathered: asyncio.Future[None] = loop.create_future()
        self._done: asyncio.Future[None] = loop.create_future()
        self._settle()

    def is_gathered(self) -> bool:
        """Tell whether the blocks may be reused."""
        return self._gathered.done()

    def is_finished(self) -> bool:
        """Tell whether nothing of this call is pending."""
        return self._done.done()

    def void(self) -> None:
        """Give up what is not gathered yet: the engine is about to reuse the blocks and cannot wait.

        What a gather reads from now on is thrown away, so it cannot be stored as the KV of these blocks.
        """
        self._void = True

    async def gathered(self) -> None:
        """Wait until the blocks may be reused."""
        await asyncio.shield(self._gathered)

    async def wait(self) -> OffloadResult:
        """Wait until nothing of this call is pending."""
        await asyncio.shield(self._done)
        return self.result

    def _mark_gathered(self, count: int) -> None:
        self._to_gather -= count
        self._settle()

    def _mark_finished(self, count: int) -> None:
        self._to_finish -= count
        self._settle()

    def _settle(self) -> None:
        if self._to_gather <= 0 and not self._gathered.done():
            self._gathered.set_result(None)
        if self._to_finish <= 0 and not self._done.done():
            self._done.set_result(None)
