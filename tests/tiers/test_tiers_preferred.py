"""Blocks of requests with high priority outlast others in a tier, for a bounded time."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynamo_kvtc.testing.conformance import TierDriver, object_key
from dynamo_kvtc.testing.wrappers import TierWrapper
from dynamo_kvtc.tiers import DiskSettings, DiskTier, HostTier, Tier
from dynamo_kvtc.tiers.stack import TierStack
from dynamo_kvtc.transfer import StagingPool, TransferAgent

SIZE = 60_000


async def _open(kind: str, agent: TransferAgent, folder: Path) -> Tier:
    """Return a tier that holds four objects of `SIZE` bytes."""
    if kind == "host":
        return TierWrapper(await HostTier.open(agent, 4 * 61_440))
    return await DiskTier.open(agent, folder, 4 * 65_536, settings=DiskSettings(segment_bytes=65_536))


@pytest.mark.parametrize("kind", ["host", "disk"])
async def test_a_preferred_object_outlasts_others(
    kind: str, agent: TransferAgent, staging: StagingPool, tmp_path: Path
) -> None:
    tier = await _open(kind, agent, tmp_path / "tier")
    driver = TierDriver(tier, staging)
    await driver.put(0, SIZE)
    TierStack([tier]).prefer([object_key(0), object_key(99)], 2)  # one that is not stored is ignored
    alive = 0
    for number in range(1, 40):
        await driver.put(number, SIZE)
        if tier.size_of(object_key(0)) is None:
            break
        alive = number
    held = tier.stats().objects
    # Usual objects are there until as many others have come as the tier holds; this one three times as long.
    assert held in (3, 4)
    assert 2 * held < alive < 4 * held
    await tier.close()


@pytest.mark.parametrize("kind", ["host", "disk"])
async def test_a_tier_full_of_preferred_objects_still_makes_room(
    kind: str, agent: TransferAgent, staging: StagingPool, tmp_path: Path
) -> None:
    tier = await _open(kind, agent, tmp_path / "tier")
    driver = TierDriver(tier, staging)
    for number in range(8):
        await driver.put(number, SIZE)
        tier.prefer([object_key(number)], 3)
    assert tier.size_of(object_key(7)) is not None
    assert tier.stats().evictions >= 4
    tier.prefer([object_key(7)], 0)
    await tier.close()
