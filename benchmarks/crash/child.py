"""The process that is killed: writes, evicts and reads as fast as it can, and says what it did.

Lines on the pipe, each written in one piece: ``R`` before the tier is opened, ``P n`` once object n is
reported as stored, ``G n`` before object n is evicted. What was written before a SIGKILL is in the pipe.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from dynamo_kvtc.errors import ObjectMissingError, TierError, TransferError
from dynamo_kvtc.testing.conformance import TierDriver, object_bytes, object_key
from dynamo_kvtc.tiers import DiskSettings, DiskTier, SharedDiskTier, Tier
from dynamo_kvtc.tiers.base import TierKey
from dynamo_kvtc.tiers.shared import _OwnTier
from dynamo_kvtc.transfer import StagingPool, TransferAgent

__all__ = ["NUMBERS", "NUMBERS_OF_CHILD", "ChildOrder", "object_size", "run_child"]

_LANES = 4

#: Objects that there may be in one folder, and those that one child may write.
NUMBERS = 50_000
NUMBERS_OF_CHILD = 2_000

#: The number of every object, by its key. Made when the module is imported, once for all forks.
_numbers: dict[TierKey, int] = {object_key(number): number for number in range(NUMBERS)}


@dataclass(frozen=True)
class ChildOrder:
    """What a child is to do: its objects have the numbers from `first` on."""

    folder: Path
    capacity_bytes: int
    settings: DiskSettings
    seed: int
    first: int
    pipe: int
    shared: bool


def object_size(number: int) -> int:
    """Return the size of object `number`, 1 byte to 60 KB."""
    return Random(number * 31 + 7).choice((1, 100, 3968, 4096, 9000, 30_000, 60_000))


async def _open(order: ChildOrder, agent: TransferAgent) -> Tier:
    """Open the tier, made to tell what it evicts before it does."""
    kind: type[DiskTier] = _OwnTier if order.shared else DiskTier

    def evict(tier: DiskTier, key: TierKey) -> None:
        _tell(order.pipe, f"G {_numbers[key]}")
        plain_evict(tier, key)

    plain_evict: Callable[[DiskTier, TierKey], None] = kind._evict
    kind._evict = evict  # type: ignore[method-assign,assignment]
    opened = SharedDiskTier if order.shared else DiskTier
    return await opened.open(agent, order.folder, order.capacity_bytes, settings=order.settings)


def _tell(pipe: int, line: str) -> None:
    os.write(pipe, f"{line}\n".encode())


def run_child(order: ChildOrder) -> None:
    """Use the tier until killed."""
    asyncio.run(_use(order))


async def _use(order: ChildOrder) -> None:
    agent = await TransferAgent.create()
    staging = await StagingPool.create(agent, 4 << 20)
    _tell(order.pipe, "R")
    tier = await _open(order, agent)
    driver = TierDriver(tier, staging)
    random = Random(order.seed)

    async def write(lane: int) -> None:
        for number in range(order.first + lane, order.first + NUMBERS_OF_CHILD, _LANES):
            try:
                if await driver.put(number, object_size(number)):
                    _tell(order.pipe, f"P {number}")
                if random.random() < 0.3:
                    await driver.get(number, 0, object_size(number))
                if order.shared and random.random() < 0.5:
                    await _read_anything(driver, order, random)
                if random.random() < 0.05:
                    await tier.evict([object_key(max(0, number - random.randrange(40)))])
            except (TierError, TransferError):
                pass  # evicted by another lane, or no room while it is being made

    await asyncio.gather(*(write(lane) for lane in range(_LANES)))


async def _read_anything(driver: TierDriver, order: ChildOrder, random: Random) -> None:
    """Read an object that another worker may have written, often pinned; wrong bytes end the child."""
    # The other worker of this round has the numbers in front or behind.
    first = max(0, order.first - NUMBERS_OF_CHILD)
    number = random.choice((first, order.first, order.first + NUMBERS_OF_CHILD)) + random.randrange(200)
    if not await driver.prefix(number):
        return
    pinned = driver.tier.pin([object_key(number)]) if random.random() < 0.5 else []
    try:
        if await driver.get(number, 0, object_size(number)) != object_bytes(number, object_size(number)):
            raise SystemExit(f"wrong bytes of object {number}")
    except ObjectMissingError:
        if pinned:
            raise SystemExit(f"object {number} vanished while pinned") from None
    finally:
        driver.tier.unpin(pinned)
