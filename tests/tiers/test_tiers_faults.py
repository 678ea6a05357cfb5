"""Every tier under the public fault suite, and the disk tiers when the file system itself fails."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from dynamo_kvtc.errors import TierFullError, TransferError, TransferTimeoutError
from dynamo_kvtc.testing.conformance import TierDriver, object_bytes, object_key
from dynamo_kvtc.testing.fault_suite import LeakCheck, TierFaultSuite
from dynamo_kvtc.tiers import DiskSettings, DiskTier, HostTier, SharedDiskTier, Tier
from dynamo_kvtc.tiers.breaker_tier import BreakerTier
from dynamo_kvtc.transfer import StagingPool, TransferAgent


class TestHostTierUnderFaults(TierFaultSuite):
    checks_bytes = False

    async def open_tier(self, agent: TransferAgent, folder: Path, capacity_bytes: int) -> Tier:
        return await HostTier.open(agent, capacity_bytes)


class TestDiskTierUnderFaults(TierFaultSuite):
    async def open_tier(self, agent: TransferAgent, folder: Path, capacity_bytes: int) -> Tier:
        settings = DiskSettings(durability="fsync")
        return await DiskTier.open(agent, folder, capacity_bytes, settings=settings)


class TestGuardedDiskTierUnderFaults(TierFaultSuite):
    async def open_tier(self, agent: TransferAgent, folder: Path, capacity_bytes: int) -> Tier:
        inner = await DiskTier.open(agent, folder, capacity_bytes)
        return BreakerTier(inner, await StagingPool.create(agent, 1 << 20))


class TestSharedDiskTierUnderFaults(TierFaultSuite):
    async def open_tier(self, agent: TransferAgent, folder: Path, capacity_bytes: int) -> Tier:
        return await SharedDiskTier.open(agent, folder, capacity_bytes)


# --- the file system ---------------------------------------------------------------------------------------

_SIZE = 40_000
_ERRORS = [errno.EIO, errno.ENOSPC, errno.EACCES]


def opened_tiers() -> list[type[DiskTier] | type[SharedDiskTier]]:
    return [DiskTier, SharedDiskTier]


@pytest.mark.parametrize("kind", opened_tiers(), ids=["disk", "shared"])
@pytest.mark.parametrize("number", _ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("call", ["pwrite", "open", "fdatasync", "fallocate", "write"])
async def test_a_file_system_that_refuses_a_call(
    kind: type[DiskTier], number: int, call: str, agent: TransferAgent, staging: StagingPool,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Stands in for disks that fail and rights that are taken away, which root does not feel: calls raise."""
    settings = DiskSettings(segment_bytes=64 << 10, durability="fsync")
    tier = await kind.open(agent, tmp_path / "tier", 1 << 20, settings=settings)
    driver = TierDriver(tier, staging)
    await driver.put(0, _SIZE)
    leaks = LeakCheck(agent, staging, tier)

    def refuse(*_: object, **__: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        if call == "fallocate":
            patched.setattr("dynamo_kvtc.tiers.disk_log.allocate_range", refuse)
        else:
            patched.setattr(os, call, refuse)
        for object_number in (1, 2):  # the second one needs another segment
            try:
                stored = await asyncio.wait_for(driver.put(object_number, _SIZE, timeout_s=2), 20)
            except (TierFullError, TransferError):
                stored = False
            assert (tier.size_of(object_key(object_number)) is not None) is stored
        # What is stored is still served.
        assert await driver.get(0, 0, _SIZE) == object_bytes(0, _SIZE)
    await tier.evict([object_key(1), object_key(2)])
    await leaks.settle(allow={"bytes beside objects": 16 << 10, "file descriptors": 4})
    for object_number in (1, 2, 3):
        assert await driver.put(object_number, _SIZE)
        assert await driver.get(object_number, 0, _SIZE) == object_bytes(object_number, _SIZE)
    await tier.close()
    tier = await kind.open(agent, tmp_path / "tier", 1 << 20, settings=settings)
    assert tier.stats().objects == 4 and tier.stats().corrupt_dropped == 0
    await tier.close()


@pytest.mark.parametrize("kind", opened_tiers(), ids=["disk", "shared"])
async def test_a_file_system_that_does_not_answer(
    kind: type[DiskTier], agent: TransferAgent, staging: StagingPool, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    tier = await kind.open(agent, tmp_path / "tier", 1 << 20)
    driver = TierDriver(tier, staging)
    await driver.put(0, _SIZE)
    leaks = LeakCheck(agent, staging, tier)
    answers = threading.Event()
    write = os.pwrite

    def stuck(fd: int, data: bytes, offset: int) -> int:
        answers.wait(30)
        return write(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", stuck)
    with pytest.raises(TransferTimeoutError):
        await asyncio.wait_for(driver.put(1, _SIZE, timeout_s=0.2), 20)
    assert tier.size_of(object_key(1)) is None
    assert await driver.get(0, 0, _SIZE) == object_bytes(0, _SIZE)
    answers.set()
    await leaks.settle(allow={"bytes beside objects": 16 << 10, "file descriptors": 4})
    assert await driver.put(1, _SIZE)
    await tier.close()
    # What the late call still wrote was taken away again: only what was reported is there.
    tier = await kind.open(agent, tmp_path / "tier", 1 << 20)
    assert tier.stats().objects == 2
    await tier.close()


async def test_a_worker_that_is_frozen_holds_up_nobody(
    agent: TransferAgent, staging: StagingPool, tmp_path: Path
) -> None:
    """A stopped process keeps its claims and locks; the others read its objects and write theirs."""
    script = (
        "import asyncio, sys\n"
        "from dynamo_kvtc.tiers import SharedDiskTier\n"
        "from dynamo_kvtc.testing.conformance import TierDriver\n"
        "from dynamo_kvtc.transfer import StagingPool, TransferAgent\n"
        "async def main():\n"
        "    agent = await TransferAgent.create()\n"
        "    tier = await SharedDiskTier.open(agent, sys.argv[1], 1 << 20)\n"
        "    driver = TierDriver(tier, await StagingPool.create(agent, 1 << 20))\n"
        "    await driver.put(0, 40_000)\n"
        "    print('ready', flush=True)\n"
        "    for number in range(10, 10_000):\n"
        "        await driver.put(number, 40_000)\n"
        "asyncio.run(main())\n"
    )
    folder = tmp_path / "tier"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, str(folder), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    assert await asyncio.wait_for(process.stdout.readline(), 60) == b"ready\n"
    process.send_signal(signal.SIGSTOP)
    try:
        tier = await SharedDiskTier.open(agent, folder, 1 << 20)
        driver = TierDriver(tier, staging)
        newest = max(n for n in (0, *range(10, 10_000)) if tier.size_of(object_key(n)) is not None)
        assert await driver.get(newest, 0, _SIZE) == object_bytes(newest, _SIZE)
        for number in range(20_000, 20_010):
            assert await driver.put(number, _SIZE)
        assert await driver.prefix(newest, 20_009) == 2
    finally:
        process.kill()
        await process.wait()
    # The one key that it may have been writing is free again.
    assert await driver.put(newest + 1, _SIZE) or await driver.prefix(newest + 1) == 1
    await tier.close()
