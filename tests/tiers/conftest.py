"""A real NIXL agent, staging memory, and drivers for opened tiers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest_asyncio

from dynamo_kvtc.testing.conformance import TierDriver
from dynamo_kvtc.tiers import DiskSettings, DiskTier
from dynamo_kvtc.transfer import StagingPool, TransferAgent

OpenDisk = Callable[..., Awaitable[TierDriver]]


@pytest_asyncio.fixture
async def agent() -> AsyncIterator[TransferAgent]:
    async with await TransferAgent.create() as agent:
        yield agent


@pytest_asyncio.fixture
async def staging(agent: TransferAgent) -> StagingPool:
    return await StagingPool.create(agent, 8 << 20)


@pytest_asyncio.fixture
async def open_disk(agent: TransferAgent, staging: StagingPool, tmp_path: Path) -> AsyncIterator[OpenDisk]:
    """Open a disk tier in ``tmp_path / "tier"``; keywords other than `capacity_bytes` are its settings."""
    opened: list[DiskTier] = []

    async def open_tier(capacity_bytes: int = 4 << 20, **settings: object) -> TierDriver:
        tier = await DiskTier.open(
            agent,
            tmp_path / "tier",
            capacity_bytes,
            settings=DiskSettings(**settings),  # type: ignore[arg-type]
        )
        opened.append(tier)
        return TierDriver(tier, staging)

    yield open_tier
    for tier in opened:
        await tier.close()
