"""What every tier must do: a pytest class that a tier's tests subclass.

class TestMyTier(TierConformance):
    async def open_tier(self, agent, folder, capacity_bytes):
        return await MyTier.open(agent, folder, capacity_bytes)
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from dynamo_kvtc.deadline import in_time
from dynamo_kvtc.errors import (
    ObjectCorruptError,
    ObjectMissingError,
    TierClosedError,
    TierError,
    TierFullError,
    TransferTimeoutError,
)
from dynamo_kvtc.tiers.base import Namespace, ReadRequest, Tier, TierKey
from dynamo_kvtc.transfer import StagingPool, TransferAgent

__all__ = ["TierConformance", "TierDriver", "object_bytes", "object_key"]

_TIMEOUT_S = 20.0
_NAMESPACE = Namespace(artifact_id=bytes(32), layout="conformance")


def object_key(number: int) -> TierKey:
    """Return the key of a test object."""
    return _NAMESPACE.key(number.to_bytes(8, "little"))


def object_bytes(number: int, nbytes: int) -> bytes:
    """Return the bytes of a test object: a different pseudo-random sequence for each number."""
    return random.Random(number).randbytes(nbytes)


@dataclass(frozen=True, slots=True)
class TierDriver:
    """A tier and staging memory to drive it with: plain bytes in and out."""

    tier: Tier
    staging: StagingPool

    async def put(self, number: int, nbytes: int, *, timeout_s: float = _TIMEOUT_S) -> bool:
        """Put test object `number`."""
        async with self.staging.lease(nbytes, _TIMEOUT_S) as span:
            span.view[:] = object_bytes(number, nbytes)
            return await self.tier.put(object_key(number), span, timeout_s=timeout_s)

    async def get(self, number: int, offset: int, nbytes: int, *, timeout_s: float = _TIMEOUT_S) -> bytes:
        """Get a range of test object `number`."""
        async with self.staging.lease(nbytes, _TIMEOUT_S) as span:
            await self.tier.get([ReadRequest(object_key(number), offset, span)], timeout_s=timeout_s)
            return bytes(span.view)

    async def prefix(self, *numbers: int) -> int:
        """Return how many leading test objects are stored."""
        return await self.tier.contains_prefix([object_key(number) for number in numbers])


class TierConformance:
    """Subclass it, implement `open_tier`, and set `persistent` if objects outlive `Tier.close`.

    Attributes
    ----------
    capacity_bytes : int
        Capacity the tests ask for. Objects of a tenth of it are used, so overhead per object should
        stay below that.
    writes_arrive_late : bool
        Whether the store may still get, whole, what a cancelled `Tier.put` was sending.
    """

    persistent = False
    writes_arrive_late = False
    capacity_bytes = 1 << 20

    async def open_tier(self, agent: TransferAgent, folder: Path, capacity_bytes: int) -> Tier:
        """Open the tier under test; a persistent one keeps its objects below `folder`."""
        raise NotImplementedError("a conformance test must say how its tier is opened")

    @pytest_asyncio.fixture
    async def agent(self) -> AsyncIterator[TransferAgent]:
        """Yield the agent that all transfers of a test go through."""
        async with await TransferAgent.create() as agent:
            yield agent

    @pytest_asyncio.fixture
    async def driver(self, agent: TransferAgent, tmp_path: Path) -> AsyncIterator[TierDriver]:
        """Yield the opened tier with staging memory of four times its capacity."""
        staging = await StagingPool.create(agent, 4 * self.capacity_bytes)
        tier = await self.open_tier(agent, tmp_path, self.capacity_bytes)
        yield TierDriver(tier, staging)
        await tier.close()
        await staging.close()

    def stored_size(self, nbytes: int) -> int:
        """Return what `TierStats.stored_bytes` counts for an object of `nbytes` bytes."""
        return nbytes

    @property
    def part(self) -> int:
        """Size of a test object: a tenth of the capacity, and odd."""
        return self.capacity_bytes // 10 - 1

    @pytest.mark.asyncio
    async def test_bytes_come_back(self, driver: TierDriver) -> None:
        for number, nbytes in enumerate((1, 63, 64, 4095, 4097, self.part)):
            assert await driver.put(number, nbytes)
            assert await driver.get(number, 0, nbytes) == object_bytes(number, nbytes)
            assert driver.tier.size_of(object_key(number)) == nbytes

    @pytest.mark.asyncio
    async def test_ranges_of_several_objects_in_one_get(self, driver: TierDriver) -> None:
        for number in range(3):
            await driver.put(number, self.part)
        ranges = [(0, 0, 1), (2, self.part - 7, 7), (1, 33, 1000), (0, 4000, 5000)]
        async with driver.staging.lease(sum(nbytes for *_, nbytes in ranges), _TIMEOUT_S) as span:
            reads, expected = [], b""
            for number, offset, nbytes in ranges:
                into = span.slice(len(expected), nbytes)
                reads.append(ReadRequest(object_key(number), offset, into))
                expected += object_bytes(number, self.part)[offset : offset + nbytes]
            await driver.tier.get(reads, timeout_s=_TIMEOUT_S)
            assert bytes(span.view) == expected

    @pytest.mark.asyncio
    async def test_prefix_ends_at_the_first_hole(self, driver: TierDriver) -> None:
        for number in (0, 1, 3):
            await driver.put(number, 100)
        assert await driver.prefix(0, 1, 2, 3) == 2
        assert await driver.prefix(2, 3) == 0
        assert await driver.prefix() == 0
        stats = driver.tier.stats()
        assert (stats.lookups, stats.hits) == (6, 2)

    @pytest.mark.asyncio
    async def test_a_key_is_written_once(self, driver: TierDriver) -> None:
        assert await driver.put(0, 100)
        assert not await driver.put(0, 200)
        assert await driver.get(0, 0, 100) == object_bytes(0, 100)
        results = await asyncio.gather(*(driver.put(1, self.part) for _ in range(4)))
        assert sorted(results) == [False, False, False, True]
        assert await driver.get(1, 0, self.part) == object_bytes(1, self.part)
        assert driver.tier.stats().puts == 2

    @pytest.mark.asyncio
    async def test_an_object_is_invisible_until_it_is_whole(self, driver: TierDriver) -> None:
        putting = asyncio.create_task(driver.put(0, self.part))
        while not putting.done():
            seen = driver.tier.size_of(object_key(0))
            await asyncio.sleep(0)
            assert seen is None or await driver.get(0, 0, self.part) == object_bytes(0, self.part)
        assert await putting
        assert driver.tier.size_of(object_key(0)) == self.part

    @pytest.mark.asyncio
    async def test_missing_objects(self, driver: TierDriver) -> None:
        with pytest.raises(ObjectMissingError):
            await driver.get(0, 0, 1)
        assert driver.tier.size_of(object_key(0)) is None
        assert driver.tier.pin([object_key(0)]) == []
        assert await driver.tier.evict([object_key(0)]) == 0
        driver.tier.unpin([object_key(0)])

    @pytest.mark.asyncio
    async def test_an_object_shorter_than_its_reader_expects_is_dropped(self, driver: TierDriver) -> None:
        await driver.put(0, 100)
        with pytest.raises(ObjectCorruptError):
            await driver.get(0, 50, 51)
        assert await driver.prefix(0) == 0
        assert driver.tier.stats().corrupt_dropped == 1
        assert await driver.put(0, 100)

    @pytest.mark.asyncio
    async def test_the_least_recently_used_object_goes_first(self, driver: TierDriver) -> None:
        stored = 0
        while not driver.tier.stats().evictions:
            await driver.put(stored, self.part)
            stored += 1
        assert driver.tier.size_of(object_key(0)) is None
        assert await driver.prefix(1) == 1
        await driver.put(stored, self.part)
        assert driver.tier.size_of(object_key(1)) == self.part
        assert driver.tier.size_of(object_key(2)) is None
        stats = driver.tier.stats()
        assert stats.allocated_bytes <= stats.capacity_bytes

    @pytest.mark.asyncio
    async def test_pinned_objects_stay(self, driver: TierDriver) -> None:
        await driver.put(0, self.part)
        assert driver.tier.pin([object_key(0), object_key(1)]) == [object_key(0)]
        driver.tier.pin([object_key(0)])
        for number in range(1, 30):
            await driver.put(number, self.part)
        driver.tier.unpin([object_key(0)])
        assert await driver.tier.evict([object_key(0)]) == 0
        await driver.tier.clear()
        stats = driver.tier.stats()
        assert (stats.objects, stats.pinned_objects) == (1, 1)
        assert await driver.get(0, 0, self.part) == object_bytes(0, self.part)
        driver.tier.unpin([object_key(0)])
        assert await driver.tier.evict([object_key(0)]) == 1

    @pytest.mark.asyncio
    async def test_a_tier_full_of_pinned_objects_refuses_and_goes_on(self, driver: TierDriver) -> None:
        number = 0
        with pytest.raises(TierFullError):
            for number in range(100):
                await driver.put(number, self.part)
                driver.tier.pin([object_key(number)])
        assert driver.tier.size_of(object_key(number)) is None
        assert driver.tier.stats().rejected_full == 1
        assert await driver.get(0, 0, self.part) == object_bytes(0, self.part)
        driver.tier.unpin([object_key(0)])
        assert await driver.put(number, self.part)

    @pytest.mark.asyncio
    async def test_an_object_larger_than_the_tier_is_refused_and_evicts_nothing(
        self, driver: TierDriver
    ) -> None:
        await driver.put(0, 100)
        with pytest.raises(TierFullError):
            await driver.put(1, 2 * self.capacity_bytes)
        assert await driver.prefix(0) == 1

    @pytest.mark.asyncio
    async def test_evicted_bytes_are_given_back(self, driver: TierDriver) -> None:
        empty = driver.tier.stats()
        for number in range(8):
            await driver.put(number, self.part - 100 * number)
        sizes = [self.part - 100 * number for number in range(8)]
        assert driver.tier.stats().stored_bytes == sum(map(self.stored_size, sizes))
        assert await driver.tier.evict([object_key(number) for number in (1, 3, 5, 5)]) == 3
        await driver.tier.clear()
        stats = driver.tier.stats()
        assert (stats.objects, stats.stored_bytes, stats.evictions) == (0, 0, 8)
        assert stats.allocated_bytes - empty.allocated_bytes < self.part
        # Nearly all of the capacity can be used again, in one piece.
        assert await driver.put(9, 8 * self.part)

    @pytest.mark.asyncio
    async def test_a_cancelled_put_leaves_nothing(self, driver: TierDriver) -> None:
        for turns in range(6):
            putting = asyncio.create_task(driver.put(turns, self.part))
            for _ in range(turns):
                await asyncio.sleep(0)
            putting.cancel()
            await asyncio.gather(putting, return_exceptions=True)
            if putting.cancelled():
                assert driver.tier.size_of(object_key(turns)) is None
                assert await driver.put(turns, self.part) or self.writes_arrive_late
            assert await driver.get(turns, 0, self.part) == object_bytes(turns, self.part)

    @pytest.mark.asyncio
    async def test_a_cancelled_get_frees_its_object(self, driver: TierDriver) -> None:
        await driver.put(0, self.part)
        getting = asyncio.create_task(driver.get(0, 0, self.part))
        await asyncio.sleep(0)
        getting.cancel()
        await asyncio.gather(getting, return_exceptions=True)
        assert await driver.tier.evict([object_key(0)]) == 1

    @pytest.mark.asyncio
    async def test_a_deadline_that_has_passed_leaves_the_tier_whole(self, driver: TierDriver) -> None:
        await driver.put(0, self.part)
        with pytest.raises(TransferTimeoutError):
            await driver.put(1, self.part, timeout_s=0.0)
        with pytest.raises(TransferTimeoutError):
            await driver.get(0, 0, self.part, timeout_s=0.0)
        assert driver.tier.size_of(object_key(1)) is None
        assert await driver.get(0, 0, self.part) == object_bytes(0, self.part)
        assert await driver.put(1, self.part)

    @pytest.mark.asyncio
    async def test_many_callers_at_once(self, driver: TierDriver) -> None:
        async def use(number: int) -> None:
            await driver.put(number % 12, self.part // 4)
            try:
                got = await driver.get(number % 12, number, self.part // 8)
            except ObjectMissingError:
                return
            assert got == object_bytes(number % 12, self.part // 4)[number : number + self.part // 8]

        await asyncio.gather(*(use(number) for number in range(60)))
        assert driver.tier.stats().bytes_read > 0

    @pytest.mark.asyncio
    async def test_a_closed_tier_says_so(self, driver: TierDriver) -> None:
        await driver.put(0, 100)
        await driver.tier.close()
        await driver.tier.close()
        with pytest.raises(TierClosedError):
            await driver.prefix(0)
        with pytest.raises(TierClosedError):
            await driver.put(1, 100)
        with pytest.raises(TierClosedError):
            await driver.get(0, 0, 100)

    @pytest.mark.asyncio
    async def test_closing_during_use(self, driver: TierDriver) -> None:
        await driver.put(0, self.part)
        using = [asyncio.create_task(driver.put(number, self.part)) for number in range(1, 5)]
        using += [asyncio.create_task(self._read(driver)) for _ in range(4)]
        await asyncio.sleep(0)
        await driver.tier.close()
        results = await in_time(asyncio.gather(*using, return_exceptions=True), _TIMEOUT_S)
        assert all(result is True or isinstance(result, TierClosedError) for result in results), results

    async def _read(self, driver: TierDriver) -> bool:
        return await driver.get(0, 0, self.part) == object_bytes(0, self.part)

    @pytest.mark.asyncio
    async def test_another_event_loop_is_refused(self, driver: TierDriver) -> None:
        def elsewhere() -> None:
            asyncio.run(driver.prefix(0))

        with pytest.raises(TierError):
            await asyncio.to_thread(elsewhere)

    @pytest.mark.asyncio
    async def test_objects_outlive_the_tier_if_it_is_persistent(
        self, agent: TransferAgent, driver: TierDriver, tmp_path: Path
    ) -> None:
        for number in range(4):
            await driver.put(number, self.part)
        await driver.tier.evict([object_key(1)])
        await driver.tier.close()
        again = TierDriver(await self.open_tier(agent, tmp_path, self.capacity_bytes), driver.staging)
        try:
            assert again.tier.stats().objects == (3 if self.persistent else 0)
            for number in (0, 2, 3) if self.persistent else ():
                assert await again.get(number, 0, self.part) == object_bytes(number, self.part)
            assert await again.prefix(1) == 0
            assert await again.put(1, self.part)
        finally:
            await again.tier.close()
