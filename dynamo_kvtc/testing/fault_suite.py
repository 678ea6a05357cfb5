"""What every tier must do when transfers and callers fail: a pytest class that a tier's tests subclass.

class TestMyTierUnderFaults(TierFaultSuite):
    async def open_tier(self, agent, folder, capacity_bytes):
        return await MyTier.open(agent, folder, capacity_bytes)

A fault must end in a miss or a typed error, by its deadline, with nothing left behind: no memory leased or
allocated, no transfer in flight, no pin, no task, no file descriptor. Afterwards the tier must work as
before.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from dynamo_kvtc.deadline import in_time
from dynamo_kvtc.errors import TierError, TransferError
from dynamo_kvtc.testing.conformance import TierDriver, object_bytes, object_key
from dynamo_kvtc.testing.transfer_faults import (
    FAULTS,
    SILENT_FAULTS,
    Fault,
    FaultyTransfer,
    cancel_at_every_await,
)
from dynamo_kvtc.tiers.base import Tier
from dynamo_kvtc.transfer import StagingPool, TransferAgent

__all__ = ["LeakCheck", "TierFaultSuite"]

# Deadline of a call under a fault, and how long it may take on a busy machine until it is called a hang.
_DEADLINE_S = 0.3
_HANG_S = 20.0
_SIZE = 50_001


class LeakCheck:
    """Remembers what is in use, and waits until no more than that is.

    Parameters
    ----------
    agent, staging, tier
        Whose memory, transfers, pins and room are counted.
    """

    def __init__(self, agent: TransferAgent, staging: StagingPool, tier: Tier) -> None:
        self._agent, self._staging, self._tier = agent, staging, tier
        self._before = self._count()

    def _count(self) -> dict[str, int]:
        stats = self._tier.stats()
        return {
            "staging bytes": self._staging.leased_bytes,
            "transfers in flight": self._agent.stats().in_flight,
            "pinned objects": stats.pinned_objects,
            "bytes beside objects": stats.allocated_bytes - stats.stored_bytes,
            "tasks": len(asyncio.all_tasks()),
            "file descriptors": sum(1 for _ in Path("/proc/self/fd").iterdir()),
        }

    async def settle(self, *, allow: dict[str, int] | None = None) -> None:
        """Wait until nothing is in use beyond what was and `allow`; fail with what is left after a while."""
        grown: dict[str, int] = {}
        for _ in range(400):
            now = self._count()
            grown = {
                name: now[name] - self._before[name]
                for name in now
                if now[name] > self._before[name] + (allow or {}).get(name, 0)
            }
            if not grown:
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"left behind: {grown}")


class TierFaultSuite:
    """Subclass it and implement `open_tier`.

    Attributes
    ----------
    capacity_bytes : int
        Capacity the tests ask for.
    checks_bytes : bool
        Whether a `get` of a whole object notices bytes that changed. If not (the host tier leaves it to
        the checksums inside the objects), reads after silent faults may return wrong bytes here.
    rounding_bytes : int
        What an object may take beside its bytes: headers, rounding, the segment it begins.
    kept_descriptors : int
        File descriptors that may stay open for the next call, such as connections to a server.

    A tier whose bytes do not come and go by the agent overrides `transfer`: with an agent of its own whose
    `arm` lets the same faults happen where they can, with ``"write"`` for puts and ``"read"`` for gets.
    """

    capacity_bytes = 1 << 20
    checks_bytes = True
    rounding_bytes = 16 << 10
    kept_descriptors = 0

    async def open_tier(self, agent: TransferAgent, folder: Path, capacity_bytes: int) -> Tier:
        """Open the tier under test on the agent given."""
        raise NotImplementedError("a fault test must say how its tier is opened")

    @pytest_asyncio.fixture
    async def transfer(self) -> AsyncIterator[FaultyTransfer]:
        """Yield the agent that fails as ordered."""
        async with await TransferAgent.create() as agent:
            yield FaultyTransfer(agent)

    @pytest_asyncio.fixture
    async def driver(self, transfer: FaultyTransfer, tmp_path: Path) -> AsyncIterator[TierDriver]:
        """Yield the opened tier, with one object in it, and staging memory."""
        staging = await StagingPool.create(transfer, 1 << 20)
        tier = await self.open_tier(transfer, tmp_path, self.capacity_bytes)
        driver = TierDriver(tier, staging)
        await driver.put(0, _SIZE)
        # The first of everything: threads, segments, buffers.
        await driver.get(0, 0, _SIZE)
        yield driver
        await tier.close()
        await staging.close()

    @pytest.mark.parametrize("fault", FAULTS)
    @pytest.mark.asyncio
    async def test_a_put_that_meets_a_fault(
        self, driver: TierDriver, transfer: FaultyTransfer, fault: Fault
    ) -> None:
        leaks = LeakCheck(transfer, driver.staging, driver.tier)
        for operation in ("copy", "write"):
            transfer.arm(fault, operation)
        stored = await self._bounded(driver.put(1, _SIZE, timeout_s=_DEADLINE_S))
        transfer.restore()
        assert transfer.met, "no transfer was made"
        assert (await driver.prefix(1) == 1) is stored
        if stored:
            await self._read_or_miss(driver, 1, fault)
        await driver.tier.evict([object_key(1)])
        await leaks.settle(allow=self._after_a_put())
        await self._works(driver)

    @pytest.mark.parametrize("fault", FAULTS)
    @pytest.mark.asyncio
    async def test_a_get_that_meets_a_fault(
        self, driver: TierDriver, transfer: FaultyTransfer, fault: Fault
    ) -> None:
        leaks = LeakCheck(transfer, driver.staging, driver.tier)
        for operation in ("copy", "read"):
            transfer.arm(fault, operation)
        await self._read_or_miss(driver, 0, fault)
        assert transfer.met, "no transfer was made"
        transfer.restore()
        await leaks.settle(allow={"file descriptors": self.kept_descriptors})
        await self._works(driver)

    @pytest.mark.asyncio
    async def test_gets_that_end_in_another_order(self, driver: TierDriver, transfer: FaultyTransfer) -> None:
        for number in range(1, 6):
            await driver.put(number, _SIZE // 4)
        leaks = LeakCheck(transfer, driver.staging, driver.tier)
        for operation in ("copy", "read"):
            transfer.arm("out_of_order", operation, count=3)
        got = await asyncio.gather(*(driver.get(number, 0, _SIZE // 4) for number in range(1, 6)))
        assert got == [object_bytes(number, _SIZE // 4) for number in range(1, 6)]
        await leaks.settle(allow={"file descriptors": self.kept_descriptors})

    @pytest.mark.asyncio
    async def test_a_put_cancelled_at_every_await(self, driver: TierDriver, transfer: FaultyTransfer) -> None:
        leaks = LeakCheck(transfer, driver.staging, driver.tier)

        async def after(ended: bool) -> None:
            if await driver.prefix(1):
                assert await driver.get(1, 0, _SIZE) == object_bytes(1, _SIZE)
                assert await driver.tier.evict([object_key(1)]) == 1
            else:
                assert not ended
            await leaks.settle(allow=self._after_a_put())

        assert await cancel_at_every_await(lambda: driver.put(1, _SIZE), after) > 0
        await self._works(driver)

    @pytest.mark.asyncio
    async def test_a_get_cancelled_at_every_await(self, driver: TierDriver, transfer: FaultyTransfer) -> None:
        leaks = LeakCheck(transfer, driver.staging, driver.tier)

        async def after(ended: bool) -> None:
            await leaks.settle(allow={"file descriptors": self.kept_descriptors})
            assert await driver.prefix(0) == 1

        assert await cancel_at_every_await(lambda: driver.get(0, 0, _SIZE), after) > 0
        await self._works(driver)

    def _after_a_put(self) -> dict[str, int]:
        # A segment that was begun stays, with what keeps it open.
        return {"bytes beside objects": self.rounding_bytes, "file descriptors": 4 + self.kept_descriptors}

    async def _bounded(self, putting: object) -> bool:
        """Await a put: whether it stored the object; a typed error is a no."""
        try:
            return bool(await in_time(putting, _HANG_S))  # type: ignore[arg-type]
        except (TierError, TransferError):
            return False

    async def _read_or_miss(self, driver: TierDriver, number: int, fault: Fault) -> None:
        try:
            got = await in_time(driver.get(number, 0, _SIZE, timeout_s=_DEADLINE_S), _HANG_S)
        except (TierError, TransferError):
            return
        if self.checks_bytes or fault not in SILENT_FAULTS:
            assert got == object_bytes(number, _SIZE)

    async def _works(self, driver: TierDriver) -> None:
        for number in (0, 7):
            await driver.tier.evict([object_key(number)])
            assert await driver.put(number, _SIZE)
            assert await driver.get(number, 0, _SIZE) == object_bytes(number, _SIZE)
