"""Making regions known to an owner's NIXL agent, and unknown again."""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import Future
from typing import Any, TypeVar

from dynamo_kvtc.deadline import in_time
from dynamo_kvtc.errors import KvtcError, TransferError
from dynamo_kvtc.transfer.backend import DRAM
from dynamo_kvtc.transfer.files import FileRegion
from dynamo_kvtc.transfer.memory import MemoryRegion
from dynamo_kvtc.transfer.owner import OwnerThread
from dynamo_kvtc.transfer.pinning import unpin

__all__ = ["CONTROL_TIMEOUT_S", "answer", "register", "release"]

T = TypeVar("T")

#: How long starting NIXL, registering and deregistering may take.
CONTROL_TIMEOUT_S = 30.0


async def register(owner: OwnerThread, region: MemoryRegion | FileRegion) -> None:
    """Register a region with the owner's agent and remember NIXL's handle in it.

    Raises
    ------
    TransferError
        If NIXL refuses or does not answer.
    """
    if isinstance(region, MemoryRegion):
        rows, kind, backends = [(region.address, region.nbytes, 0, "")], DRAM, owner.memory_backends
    else:
        rows = [(0, region.nbytes, region.fd, region.registered_name)]
        kind, backends = region.kind, [region.backend]
    region.registration = await answer(
        owner.call(lambda: owner.register(rows, kind, backends)), "registering a region"
    )


def release(owner: OwnerThread, region: MemoryRegion | FileRegion) -> Future[None]:
    """Deregister a region that nothing in flight touches, and close its file if it is ours to close."""
    registration: Any = region.registration
    region.registration = None

    def work() -> None:
        try:
            backends = owner.memory_backends if isinstance(region, MemoryRegion) else [region.backend]
            owner.deregister(registration, backends)
        finally:
            if isinstance(region, MemoryRegion) and region.pinned:
                region.pinned = False
                unpin(region.address)
            if isinstance(region, FileRegion) and region.owns_fd:
                os.close(region.fd)

    return owner.call(work)


async def answer(future: Future[T], doing: str) -> T:
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
