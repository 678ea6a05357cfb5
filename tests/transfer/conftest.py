"""A real NIXL agent for the transfer tests."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio

from dynamo_kvtc.transfer import AgentSettings, TransferAgent


@pytest_asyncio.fixture
async def agent() -> AsyncIterator[TransferAgent]:
    settings = AgentSettings(max_post_bytes=64 << 10, drain_limit_s=0.3, close_timeout_s=1.0)
    async with await TransferAgent.create(settings) as agent:
        yield agent
