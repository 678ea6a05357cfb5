"""Tiers as one: write-through, falling through to slower tiers, promotion, pins."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from dynamo_kvtc.errors import (
    ObjectCorruptError,
    ObjectMissingError,
    TierFullError,
    TransferError,
    TransferTimeoutError,
)
from dynamo_kvtc.testing import FaultyTier
from dynamo_kvtc.testing.conformance import TierDriver, object_bytes, object_key
from dynamo_kvtc.tiers import DiskTier, HostTier, ReadRequest, TierStack
from dynamo_kvtc.tiers.index import Location
from dynamo_kvtc.transfer import StagingPool, TransferAgent

SIZE = 20_000


@dataclass
class Stacked:
    """A host tier for about five objects over a disk tier for many, each tier reachable by itself."""

    stack: TierStack
    host: TierDriver
    disk: TierDriver

    async def put(self, number: int) -> bool:
        async with self.host.staging.lease(SIZE, 10) as span:
            span.view[:] = object_bytes(number, SIZE)
            return await self.stack.put(object_key(number), span, timeout_s=10)

    async def get(self, *numbers: int, timeout_s: float = 10) -> list[bytes]:
        async with self.host.staging.lease(SIZE * len(numbers), 10) as span:
            spans = [span.slice(index * SIZE, SIZE) for index in range(len(numbers))]
            reads = [ReadRequest(object_key(n), 0, into) for n, into in zip(numbers, spans, strict=True)]
            await self.stack.get(reads, timeout_s=timeout_s)
            return [bytes(into.view) for into in spans]

    async def where(self, *numbers: int) -> list[str]:
        return [tier.name for tier in await self.stack.lookup_prefix([object_key(n) for n in numbers])]

    def wrap(self, host: FaultyTier | None = None, disk: FaultyTier | None = None) -> None:
        self.stack = TierStack([host or self.host.tier, disk or self.disk.tier])


@pytest_asyncio.fixture
async def stacked(agent: TransferAgent, staging: StagingPool, tmp_path: Path) -> AsyncIterator[Stacked]:
    host = await HostTier.open(agent, 5 * 20_032)
    disk = await DiskTier.open(agent, tmp_path, 4 << 20)
    stacked = Stacked(TierStack([host, disk]), TierDriver(host, staging), TierDriver(disk, staging))
    yield stacked
    await stacked.stack.close()


async def test_puts_go_to_every_tier_and_reads_come_from_the_fastest(stacked: Stacked) -> None:
    for number in range(8):
        assert await stacked.put(number)
    assert not await stacked.put(7)
    assert await stacked.where(*range(9)) == ["disk"] * 3 + ["host"] * 5
    assert await stacked.stack.contains_prefix([object_key(n) for n in (7, 0, 99, 1)]) == 2
    assert await stacked.get(0, 7, 1) == [object_bytes(n, SIZE) for n in (0, 7, 1)]
    stats = stacked.stack.stats()
    assert list(stats) == ["host", "disk"]
    assert (stats["host"].bytes_read, stats["disk"].bytes_read) == (SIZE, 2 * SIZE)
    assert stacked.stack.size_of(object_key(0)) == SIZE
    assert stacked.stack.size_of(object_key(99)) is None


async def test_what_is_in_use_stays_young_in_every_tier(stacked: Stacked) -> None:
    await stacked.put(0)
    await stacked.put(1)
    await stacked.where(0)
    assert list(stacked.disk.tier._index.oldest_first()) == [object_key(1), object_key(0)]  # type: ignore[attr-defined]


async def test_one_failing_tier_does_not_fail_a_put(stacked: Stacked) -> None:
    stacked.wrap(disk=FaultyTier(stacked.disk.tier, failing_puts={0: TierFullError("full")}))
    assert await stacked.put(0)
    assert stacked.stack.failed_puts == 1
    assert await stacked.where(0) == ["host"]
    stacked.wrap(host=FaultyTier(stacked.host.tier, failing_puts={0: TransferError("broken")}))
    assert await stacked.put(1)
    assert await stacked.where(1) == ["disk"]
    stacked.wrap(
        host=FaultyTier(stacked.host.tier, failing_puts={0: TransferError("broken")}),
        disk=FaultyTier(stacked.disk.tier, failing_puts={0: TierFullError("full")}),
    )
    with pytest.raises(TransferError, match="broken"):
        await stacked.put(2)


@pytest.mark.parametrize(
    "error", [ObjectMissingError("gone"), ObjectCorruptError("bad"), TransferError("broken")]
)
async def test_a_failing_read_falls_through_to_the_next_tier(stacked: Stacked, error: Exception) -> None:
    for number in range(3):
        await stacked.put(number)
    stacked.wrap(host=FaultyTier(stacked.host.tier, failing={0: error}))
    assert await stacked.get(0, 1, 2) == [object_bytes(n, SIZE) for n in range(3)]


async def test_only_the_damaged_object_is_read_from_the_slower_tier(stacked: Stacked, tmp_path: Path) -> None:
    for number in range(2):
        await stacked.put(number)
    await stacked.disk.put(2, 100)
    async with stacked.host.staging.lease(SIZE, 10) as span:
        # The host's copy of object 2 is shorter than its reader needs, as is the disk's: a miss.
        await stacked.host.put(2, 100)
        with pytest.raises(ObjectCorruptError):
            await stacked.stack.get([ReadRequest(object_key(2), 0, span)], timeout_s=10)
    assert await stacked.where(2) == []
    await stacked.host.tier.evict([object_key(1)])
    await stacked.host.put(1, 100)
    assert await stacked.get(0, 1) == [object_bytes(n, SIZE) for n in range(2)]
    assert await stacked.where(0, 1) == ["host", "disk"]
    assert stacked.disk.tier.stats().bytes_read == SIZE


async def test_a_missing_object_and_a_stuck_tier(stacked: Stacked) -> None:
    await stacked.put(0)
    with pytest.raises(ObjectMissingError):
        await stacked.get(0, 1)
    stacked.wrap(host=FaultyTier(stacked.host.tier, stuck=[0]))
    with pytest.raises(TransferTimeoutError):
        await stacked.get(0, timeout_s=0.01)
    assert await stacked.get(0) == [object_bytes(0, SIZE)]


async def test_the_last_tiers_failure_is_the_readers(stacked: Stacked) -> None:
    await stacked.disk.put(0, SIZE)
    stacked.wrap(disk=FaultyTier(stacked.disk.tier, failing={0: TransferError("broken")}))
    with pytest.raises(TransferError, match="broken"):
        await stacked.get(0)


async def test_promotion_copies_into_the_first_tier_within_its_bound(stacked: Stacked) -> None:
    for number in range(8):
        await stacked.put(number)
    stack = TierStack(stacked.stack.tiers, staging=stacked.host.staging, max_promotions=2)
    stacked.stack = stack
    await stacked.get(0, 1, 2)
    assert [await stacked.where(number) for number in (0, 1, 2)] == [["disk"]] * 3  # reading moves nothing
    stack.promote(object_key(number) for number in (7, 0, 1, 2, 99))
    await stack.settle()
    assert stack.promotions == 2
    assert [await stacked.where(number) for number in (0, 1, 2)] == [["host"], ["host"], ["disk"]]
    assert await stacked.get(0, 1, 2) == [object_bytes(n, SIZE) for n in (0, 1, 2)]
    TierStack(stack.tiers).promote([object_key(2)])  # without staging memory nothing is promoted
    assert await stacked.where(2) == ["disk"]


async def test_promotions_are_one_task_and_end_with_the_stack(stacked: Stacked) -> None:
    for number in range(8):
        await stacked.put(number)
    stack = TierStack(stacked.stack.tiers, staging=stacked.host.staging)
    before = asyncio.all_tasks()
    stack.promote(object_key(number) for number in range(3))
    (task,) = asyncio.all_tasks() - before
    stack.promote(object_key(number) for number in range(3))
    assert asyncio.all_tasks() - before == {task}
    await asyncio.sleep(0)
    await stack.close()
    assert task.done()
    for _ in range(400):  # a transfer that was given up drains first
        if not stacked.host.staging.leased_bytes:
            break
        await asyncio.sleep(0.01)
    assert stacked.host.staging.leased_bytes == 0


async def test_a_long_lookup_lets_others_use_the_event_loop(stacked: Stacked, agent: TransferAgent) -> None:
    keys = [object_key(number) for number in range(4000)]
    for tier in (stacked.host.tier, stacked.disk.tier):
        for key in keys:
            tier._index.add(key, Location(0, 0, 1))  # type: ignore[attr-defined]
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.ensure_future(count_turns())
    assert await stacked.stack.contains_prefix(keys) == 4000
    counting.cancel()
    # Once for each tier, and then for every 512 keys.
    assert turns >= 2 + 4000 // 512
    order = list(stacked.host.tier._index.oldest_first())  # type: ignore[attr-defined]
    assert order == keys[::-1]
    for tier in (stacked.host.tier, stacked.disk.tier):
        for key in keys:
            tier._index.remove(key)  # type: ignore[attr-defined]


async def test_pins_hold_in_the_tiers_that_had_the_object(stacked: Stacked) -> None:
    await stacked.disk.put(0, SIZE)
    assert stacked.stack.pin([object_key(0), object_key(1)]) == [object_key(0)]
    await stacked.host.put(0, SIZE)
    assert stacked.stack.pin([object_key(0)]) == [object_key(0)]
    # One copy each: the disk's is pinned twice, the host's once.
    stacked.stack.unpin([object_key(0)])
    assert await stacked.stack.evict([object_key(0)]) == 1
    await stacked.stack.clear()
    assert await stacked.where(0) == ["disk"]
    stacked.stack.unpin([object_key(0), object_key(5)])
    await stacked.stack.clear()
    assert await stacked.where(0) == []


async def test_senseless_stacks_are_refused(stacked: Stacked) -> None:
    with pytest.raises(ValueError):
        TierStack([])
    with pytest.raises(ValueError):
        TierStack([stacked.host.tier, stacked.host.tier])
