"""The misbehaving tiers of the conformance kit, and that they are tiers otherwise."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from dynamo_kvtc.errors import ObjectCorruptError, TransferError, TransferTimeoutError
from dynamo_kvtc.testing import FaultyTier, ThrottledTier, TierWrapper, wrappers
from dynamo_kvtc.testing.conformance import TierConformance, TierDriver, object_bytes, object_key
from dynamo_kvtc.tiers import HostTier, Tier
from dynamo_kvtc.transfer import StagingPool, TransferAgent


class TestWrappedTier(TierConformance):
    """Wrapping changes nothing by itself."""

    async def open_tier(self, agent: TransferAgent, folder: Path, capacity_bytes: int) -> Tier:
        inner = await HostTier.open(agent, capacity_bytes)
        return ThrottledTier(FaultyTier(TierWrapper(inner)), 1e12)


async def test_the_throttle_lets_bytes_pass_one_after_the_other(
    agent: TransferAgent, staging: StagingPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock stands still and sleeps are written down: what counts is how long was to be waited."""
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(round(seconds, 9))

    monkeypatch.setattr(wrappers, "time", SimpleNamespace(monotonic=lambda: 50.0))
    monkeypatch.setattr(wrappers, "asyncio", SimpleNamespace(sleep=sleep))
    tier = ThrottledTier(await HostTier.open(agent, 1 << 20), 100_000, latency_s=0.01)
    driver = TierDriver(tier, staging)
    await driver.put(0, 2000)
    assert await driver.get(0, 0, 2000) == object_bytes(0, 2000)
    await driver.get(0, 0, 1000)
    with pytest.raises(TransferTimeoutError, match="throttled"):
        await driver.get(0, 0, 2000, timeout_s=0.07)
    assert slept == [0.03, 0.05, 0.06, 0.07]
    with pytest.raises(ValueError):
        ThrottledTier(tier, 0)


async def test_ordered_faults_happen_once(agent: TransferAgent, staging: StagingPool) -> None:
    tier = FaultyTier(
        await HostTier.open(agent, 1 << 20),
        failing={0: ObjectCorruptError("ordered")},
        short=[1],
        stuck=[2],
        failing_puts={1: TransferError("ordered")},
        delay_s=0.001,
    )
    driver = TierDriver(tier, staging)
    await driver.put(0, 100)
    with pytest.raises(TransferError, match="ordered"):
        await driver.put(1, 100)
    with pytest.raises(ObjectCorruptError, match="ordered"):
        await driver.get(0, 0, 100)
    assert await driver.get(0, 0, 100) == object_bytes(0, 100)[:50] + bytes(50)
    with pytest.raises(TransferTimeoutError, match="stuck"):
        await driver.get(0, 0, 100, timeout_s=0.01)
    assert await driver.get(0, 0, 100) == object_bytes(0, 100)
    assert (tier.gets, tier.puts) == (4, 2)
    assert tier.size_of(object_key(1)) is None
