"""Which owner an agent uses, and putting a fresh one in its place when a transfer is stuck in it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable

from dynamo_kvtc.deadline import in_time
from dynamo_kvtc.errors import TransferError
from dynamo_kvtc.transfer.files import FileRegion
from dynamo_kvtc.transfer.memory import MemoryRegion
from dynamo_kvtc.transfer.owner import OwnerThread
from dynamo_kvtc.transfer.registration import CONTROL_TIMEOUT_S, register, start_owner
from dynamo_kvtc.transfer.settings import AgentSettings

__all__ = ["Succession"]

#: Owners stuck in a transfer that may be replaced before the agent gives up: the storage itself is gone.
_MAX_STUCK_OWNERS = 4


class Succession:
    """The owner thread in use and its successors. Lives on the agent's loop.

    Parameters
    ----------
    owner : OwnerThread
        The first one, started.
    regions : Callable
        Returns what a successor must know: every region that the agent holds.

    Attributes
    ----------
    owner : OwnerThread
        The one in use.
    replaced : int
        How often one was replaced.
    broken : TransferError, optional
        Why there is no successor any more.
    """

    def __init__(
        self,
        settings: AgentSettings,
        owner: OwnerThread,
        regions: Callable[[], Iterable[MemoryRegion | FileRegion]],
    ) -> None:
        self.owner = owner
        self.replaced = 0
        self.broken: TransferError | None = None
        self._settings, self._regions = settings, regions
        self._retired: list[OwnerThread] = []
        self._in_place = asyncio.Event()
        self._in_place.set()
        self._replacing: asyncio.Task[None] | None = None

    @property
    def is_in_place(self) -> bool:
        """Whether the owner is not being replaced."""
        return self._in_place.is_set()

    async def in_place(self) -> None:
        """Wait while the owner is being replaced."""
        await self._in_place.wait()

    async def settled(self) -> None:
        """Wait while the owner is being replaced, not for ever: regions must not come or go meanwhile."""
        if not self.is_in_place:
            with contextlib.suppress(asyncio.TimeoutError):
                await in_time(self.in_place(), CONTROL_TIMEOUT_S)

    async def end(self, timeout_s: float) -> None:
        """Wait for the end of a replacement that has begun, for `timeout_s` at most."""
        if self._replacing is not None:
            await asyncio.wait({self._replacing}, timeout=timeout_s)

    def replace(self, stuck: OwnerThread) -> None:
        """Begin to replace an owner, unless that is under way or has been done."""
        if stuck is self.owner and self._replacing is None:
            self._in_place.clear()
            self._replacing = asyncio.get_running_loop().create_task(
                self._replace(), name="kvtc-replace-nixl"
            )

    async def _replace(self) -> None:
        self._retired = [retired for retired in self._retired if retired.alive]
        try:
            if len(self._retired) == _MAX_STUCK_OWNERS:
                raise TransferError(
                    "transfers keep getting stuck; check the storage below the tiers, then restart"
                )
            owner = await start_owner(self._settings)
            try:
                for region in list(self._regions()):
                    await register(owner, region)
            except BaseException:
                owner.stop()
                raise
            self._retired.append(self.owner)
            self.owner.stop()
            self.owner = owner
            self.replaced += 1
        except TransferError as error:
            self.broken = error
        finally:
            self._replacing = None
            self._in_place.set()
