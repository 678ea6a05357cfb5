"""Both tiers pass the public conformance kit."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynamo_kvtc.testing.conformance import TierConformance
from dynamo_kvtc.testing.stateful import OpenTier, check_tier_against_model
from dynamo_kvtc.tiers import DiskSettings, DiskTier, HostTier, SharedDiskTier, Tier
from dynamo_kvtc.transfer import TransferAgent


async def open_host(agent: TransferAgent, folder: Path, capacity_bytes: int) -> Tier:
    return await HostTier.open(agent, capacity_bytes)


async def open_disk(agent: TransferAgent, folder: Path, capacity_bytes: int) -> Tier:
    return await DiskTier.open(agent, folder, capacity_bytes)


async def open_disk_of_small_segments(agent: TransferAgent, folder: Path, capacity_bytes: int) -> Tier:
    settings = DiskSettings(segment_bytes=capacity_bytes // 4, durability="fsync", verify_at_open="objects")
    return await DiskTier.open(agent, folder, capacity_bytes, settings=settings)


class TestHostTier(TierConformance):
    async def open_tier(self, agent: TransferAgent, folder: Path, capacity_bytes: int) -> Tier:
        return await open_host(agent, folder, capacity_bytes)


class TestDiskTier(TierConformance):
    persistent = True

    async def open_tier(self, agent: TransferAgent, folder: Path, capacity_bytes: int) -> Tier:
        return await open_disk(agent, folder, capacity_bytes)


class TestDiskTierOfSmallSegments(TierConformance):
    persistent = True

    async def open_tier(self, agent: TransferAgent, folder: Path, capacity_bytes: int) -> Tier:
        return await open_disk_of_small_segments(agent, folder, capacity_bytes)


async def open_shared(agent: TransferAgent, folder: Path, capacity_bytes: int) -> Tier:
    return await SharedDiskTier.open(agent, folder / "shared", capacity_bytes)


class TestSharedDiskTier(TierConformance):
    persistent = True

    async def open_tier(self, agent: TransferAgent, folder: Path, capacity_bytes: int) -> Tier:
        return await open_shared(agent, folder, capacity_bytes)


@pytest.mark.parametrize(
    ("open_tier", "persistent"),
    [(open_host, False), (open_disk, True), (open_disk_of_small_segments, True), (open_shared, True)],
    ids=["host", "disk", "disk-small-segments", "shared"],
)
def test_tier_agrees_with_the_model(open_tier: OpenTier, persistent: bool) -> None:
    check_tier_against_model(open_tier, persistent=persistent)
