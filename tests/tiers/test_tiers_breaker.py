"""A tier that keeps timing out is passed over, tried in the background, and taken back."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from dynamo_kvtc.errors import StoreUnavailableError, TierFullError, TransferError, TransferTimeoutError
from dynamo_kvtc.testing import FaultyTier, TierWrapper
from dynamo_kvtc.testing.conformance import TierConformance, TierDriver, object_bytes, object_key
from dynamo_kvtc.tiers import DiskTier, HostTier, Tier, TierKey, TierStack
from dynamo_kvtc.tiers.breaker import CircuitBreaker
from dynamo_kvtc.tiers.breaker_tier import BreakerTier
from dynamo_kvtc.transfer import MemorySpan, StagingPool, TransferAgent

PATIENCE_S = 0.05


class Clock:
    """Moves when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Stuck(TierWrapper):
    """A tier that stops answering, and minds no deadline but its caller's, as a hanging mount does."""

    def __init__(self, inner: Tier) -> None:
        super().__init__(inner)
        self.lookups_hang = self.reads_hang = self.writes_hang = False
        self.calls = 0

    async def contains_prefix(self, keys: Sequence[TierKey]) -> int:
        await self._pass(self.lookups_hang)
        return await super().contains_prefix(keys)

    async def get(self, reads: Sequence, *, timeout_s: float) -> None:  # type: ignore[type-arg]
        await self._pass(self.reads_hang)
        await super().get(reads, timeout_s=timeout_s)

    async def put(self, key: TierKey, source: MemorySpan, *, timeout_s: float) -> bool:
        await self._pass(self.writes_hang)
        return await super().put(key, source, timeout_s=timeout_s)

    async def _pass(self, hangs: bool) -> None:
        self.calls += 1
        if hangs:
            await asyncio.sleep(3600)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def guard(inner: Tier, staging: StagingPool, clock: Clock) -> BreakerTier:
    return BreakerTier(
        inner,
        staging,
        patience_s=PATIENCE_S,
        trial_s=0.2,
        reading=CircuitBreaker(clock=clock),
        writing=CircuitBreaker(clock=clock),
    )


async def on_trial(tier: BreakerTier, *numbers: int) -> None:
    """Ask for objects, which begins a trial, and see it end."""
    assert await tier.contains_prefix([object_key(number) for number in numbers]) == 0
    assert tier._trial is not None
    await tier._trial


class TestGuardedTier(TierConformance):
    """The breakers change nothing while everything works."""

    persistent = True

    async def open_tier(self, agent: TransferAgent, folder: Path, capacity_bytes: int) -> Tier:
        staging = await StagingPool.create(agent, 1 << 20)
        return BreakerTier(await DiskTier.open(agent, folder, capacity_bytes), staging)


async def test_lookups_that_hang_stop_costing_anything(
    agent: TransferAgent, staging: StagingPool, clock: Clock
) -> None:
    inner = Stuck(await HostTier.open(agent, 1 << 20))
    tier = guard(inner, staging, clock)
    await TierDriver(tier, staging).put(0, 1000)
    inner.lookups_hang = True
    for _ in range(3):
        assert await tier.contains_prefix([object_key(0)]) == 0
    calls = inner.calls
    assert await tier.contains_prefix([object_key(0)]) == 0
    assert tier.size_of(object_key(0)) is None
    assert inner.calls == calls
    assert (tier.stats().pauses, tier.stats().paused) == (1, 1)
    # The trial hangs as well, and nobody waits for it.
    clock.now += 6
    await on_trial(tier, 0)
    assert tier.stats().pauses == 2 and tier.stats().paused
    inner.lookups_hang = False
    clock.now += 11
    await on_trial(tier, 0)
    assert await tier.contains_prefix([object_key(0)]) == 1 and not tier.stats().paused
    await tier.close()


async def test_reads_that_hang_fail_at_once_until_one_is_done_in_time(
    agent: TransferAgent, staging: StagingPool, clock: Clock
) -> None:
    inner = Stuck(await HostTier.open(agent, 1 << 20))
    tier = guard(inner, staging, clock)
    driver = TierDriver(tier, staging)
    await driver.put(0, 1000)
    inner.reads_hang = True
    for _ in range(3):
        # Ended from outside, after all of its time: what an onboard's deadline does.
        with pytest.raises((TimeoutError, asyncio.TimeoutError)):
            await asyncio.wait_for(driver.get(0, 0, 1000, timeout_s=PATIENCE_S), 2 * PATIENCE_S)
    calls = inner.calls
    with pytest.raises(StoreUnavailableError, match="kept timing out"):
        await driver.get(0, 0, 1000)
    assert inner.calls == calls and tier.size_of(object_key(0)) is None
    clock.now += 6
    inner.reads_hang = False
    await on_trial(tier, 0)
    assert await driver.get(0, 0, 1000) == object_bytes(0, 1000)
    await tier.close()


async def test_small_reads_do_not_hide_that_large_ones_are_late(
    agent: TransferAgent, staging: StagingPool, clock: Clock
) -> None:
    """A header comes in time, what follows does not, again and again."""
    inner = FaultyTier(await HostTier.open(agent, 1 << 20), stuck=[1, 3, 7, 9, 11])
    tier = guard(inner, staging, clock)
    driver = TierDriver(tier, staging)
    await driver.put(0, 1000)

    async def onboard() -> None:
        await driver.get(0, 0, 10)
        await driver.get(0, 10, 990, timeout_s=PATIENCE_S)

    for _ in range(2):
        with pytest.raises(TransferTimeoutError):
            await onboard()
    await onboard()
    for _ in range(3):
        assert not tier.stats().paused
        with pytest.raises(TransferTimeoutError):
            await onboard()
    assert tier.stats().paused
    await tier.close()


async def test_one_late_read_after_a_trial_is_enough_and_pauses_grow(
    agent: TransferAgent, staging: StagingPool, clock: Clock
) -> None:
    inner = Stuck(await HostTier.open(agent, 1 << 20))
    tier = guard(inner, staging, clock)
    driver = TierDriver(tier, staging)
    await driver.put(0, 1000)
    pauses = []
    for late in (3, 1, 1):
        inner.reads_hang = True
        for _ in range(late):
            with pytest.raises((TimeoutError, asyncio.TimeoutError)):
                await asyncio.wait_for(driver.get(0, 0, 1000, timeout_s=PATIENCE_S), 2 * PATIENCE_S)
        pauses.append(tier.reading.retry_in_s)
        clock.now += pauses[-1] + 1
        inner.reads_hang = False
        await on_trial(tier, 0)
    assert pauses == [5, 10, 20]
    await driver.get(0, 0, 1000)
    assert tier.reading.state == "closed"
    await tier.close()


async def test_what_says_nothing_about_the_tier_does_not_count(
    agent: TransferAgent, staging: StagingPool, clock: Clock
) -> None:
    inner = Stuck(await HostTier.open(agent, 1 << 20))
    tier = guard(inner, staging, clock)
    driver = TierDriver(tier, staging)
    await driver.put(0, 1000)
    inner.reads_hang = True
    for _ in range(5):
        # Given too little time, and cancelled early.
        with pytest.raises((TimeoutError, asyncio.TimeoutError)):
            await asyncio.wait_for(driver.get(0, 0, 1000, timeout_s=PATIENCE_S / 2), PATIENCE_S)
        with pytest.raises((TimeoutError, asyncio.TimeoutError)):
            await asyncio.wait_for(driver.get(0, 0, 1000, timeout_s=10), PATIENCE_S)
    inner.reads_hang = False
    faulty = FaultyTier(inner, failing={n: TransferError("told at once") for n in range(5)})
    tier.inner = faulty
    for _ in range(5):
        with pytest.raises(TransferError, match="told at once"):
            await driver.get(0, 0, 1000)
    assert await driver.get(0, 0, 1000) == object_bytes(0, 1000)
    # A trial of objects that are not there leaves open whether reads would end.
    for _ in range(3):
        tier.reading.failed()
    tier._late_bytes = 1000
    clock.now += 6
    await on_trial(tier, 7)
    assert tier.reading.state == "half_open"
    await on_trial(tier, 0)
    assert tier.reading.state == "closed"
    await tier.close()


async def test_writes_that_hang_leave_reading_alone(
    agent: TransferAgent, staging: StagingPool, clock: Clock
) -> None:
    inner = Stuck(await HostTier.open(agent, 1 << 20))
    tier = guard(inner, staging, clock)
    driver = TierDriver(tier, staging)
    await driver.put(0, 1000)
    inner.writes_hang = True
    tier.inner = Deadline(inner)
    for _ in range(3):
        with pytest.raises(TransferTimeoutError):
            await driver.put(1, 1000, timeout_s=PATIENCE_S)
    calls = inner.calls
    with pytest.raises(StoreUnavailableError):
        await driver.put(1, 1000)
    assert inner.calls == calls
    assert await driver.get(0, 0, 1000) == object_bytes(0, 1000)
    inner.writes_hang = False
    clock.now += 6
    assert await driver.put(1, 1000)
    # That a tier is full is an answer.
    for _ in range(4):
        with pytest.raises(TierFullError):
            await driver.put(2, 2 << 20)
    assert await driver.put(3, 1000)
    await tier.close()


class Deadline(TierWrapper):
    """Keeps the deadline that a stuck tier inside does not."""

    async def put(self, key: TierKey, source: MemorySpan, *, timeout_s: float) -> bool:
        try:
            return await asyncio.wait_for(super().put(key, source, timeout_s=timeout_s), timeout_s)
        except (TimeoutError, asyncio.TimeoutError):
            raise TransferTimeoutError("the put was stuck") from None


async def test_a_stack_serves_from_the_tiers_that_answer(
    agent: TransferAgent, staging: StagingPool, clock: Clock
) -> None:
    first = await HostTier.open(agent, 1 << 20, name="first")
    stuck = Stuck(await HostTier.open(agent, 1 << 20, name="second"))
    stack = TierStack([guard(first, staging, clock), guard(stuck, staging, clock)])
    keys = [object_key(number) for number in range(3)]
    for number, key in enumerate(keys):
        async with staging.lease(1000, timeout_s=1) as span:
            span.view[:] = object_bytes(number, 1000)
            await stack.put(key, span, timeout_s=5)
    await first.evict(keys[2:])
    assert len(await stack.lookup_prefix(keys)) == 3
    stuck.lookups_hang = True
    for _ in range(3):
        await stack.lookup_prefix(keys)
    calls = stuck.calls
    assert [tier.name for tier in await stack.lookup_prefix(keys)] == ["first", "first"]
    assert stuck.calls == calls
    await stack.close()


async def test_a_tier_is_closed_though_its_trial_failed_unexpectedly(
    agent: TransferAgent, staging: StagingPool, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(TierWrapper):
        async def contains_prefix(self, keys: Sequence[TierKey]) -> int:
            raise ZeroDivisionError

    inner = await HostTier.open(agent, 1 << 20)
    tier = guard(Broken(inner), staging, clock)
    for _ in range(3):
        tier.reading.failed()
    clock.now += 3600
    assert await tier.contains_prefix([object_key(0)]) == 0
    await asyncio.sleep(0.05)
    await tier.close()
    assert inner._closed
    assert "failed unexpectedly" in caplog.text
