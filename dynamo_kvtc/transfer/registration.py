"""Starting an owner, and making regions known to its NIXL agent and unknown again."""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import Future
from typing import Any, TypeVar

from dynamo_kvtc.deadline import in_time
from dynamo_kvtc.errors import KvtcError, TransferError
from dynamo_kvtc.transfer.files import FileRegion
from dynamo_kvtc.transfer.memory import MemoryRegion
from dynamo_kvtc.transfer.owner import OwnerThread
from dynamo_kvtc.transfer.pinning import unpin
from dynamo_kvtc.transfer.settings import AgentSettings

__all__ = ["CONTROL_TIMEOUT_S", "register", "release", "start_owner"]

T = TypeVar("T")

#: How long starting NIXL, registering and deregistering may take.
CONTROL_TIMEOUT_S = 30.0


async def start_owner(settings: AgentSettings) -> OwnerThread:
    """Return an owner whose NIXL agent is ready; if that fails or is cancelled, its thread ends.

    Raises
    ------
    MissingDependencyError
        If no NIXL package is installed.
    TransferError
        If NIXL cannot be set up, or does not answer.
    """
    owner = OwnerThread(settings)
    try:
        await _answer(owner.start(), "starting NIXL")
    except BaseException:
        owner.stop()
        raise
    return owner


async def register(owner: OwnerThread, region: MemoryRegion | FileRegion) -> None:
    """Register a region with the owner's agent and remember NIXL's handle in it.

    If that fails or is cancelled, the region does not stay registered.

    Raises
    ------
    TransferError
        If NIXL refuses or does not answer.
    """
    if isinstance(region, MemoryRegion):
        rows = [(region.address, region.nbytes, region.device, "")]
        kind, backends = region.kind, owner.backends_of(region.kind)
    else:
        rows = [(0, region.nbytes, region.fd, region.registered_name)]
        kind, backends = region.kind, [region.backend]
    registering = owner.call(lambda: owner.register(rows, kind, backends))

    def undo(done: Future[Any]) -> None:
        # The region is held until NIXL has let go of its memory.
        def deregister(_held: MemoryRegion | FileRegion = region) -> None:
            owner.deregister(done.result(), backends)

        if not done.cancelled() and done.exception() is None:
            owner.call(deregister)

    try:
        region.registration = await _answer(registering, "registering a region")
    except BaseException:
        registering.add_done_callback(undo)
        raise


def release(owner: OwnerThread, region: MemoryRegion | FileRegion) -> Future[None]:
    """Deregister a region that nothing in flight touches, and close its file if it is ours to close."""
    registration: Any = region.registration
    region.registration = None

    def work() -> None:
        try:
            backends = (
                owner.backends_of(region.kind) if isinstance(region, MemoryRegion) else [region.backend]
            )
            owner.deregister(registration, backends)
        finally:
            if isinstance(region, MemoryRegion) and region.pinned:
                region.pinned = False
                unpin(region.address)
            if isinstance(region, FileRegion) and region.owns_fd:
                os.close(region.fd)

    return owner.call(work)


async def _answer(future: Future[T], doing: str) -> T:
    """Await work of the owner thread; every failure is a typed error.

    Raises
    ------
    TransferError
        If the work failed, or did not end within `CONTROL_TIMEOUT_S`.
    """
    try:
        return await in_time(asyncio.wrap_future(future), CONTROL_TIMEOUT_S)
    except asyncio.TimeoutError:
        raise TransferError(f"{doing} did not finish within {CONTROL_TIMEOUT_S:g} s") from None
    except KvtcError:
        raise
    except Exception as error:
        raise TransferError(f"{doing} failed: {error!r}") from error
