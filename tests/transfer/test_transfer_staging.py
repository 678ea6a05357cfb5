"""The staging pool: order, deadlines, bounds, parked leases."""

from __future__ import annotations

import asyncio
import os
import select

import pytest

from dynamo_kvtc.errors import TransferError, TransferTimeoutError
from dynamo_kvtc.transfer import StagingPool, TransferAgent


async def test_leases_do_not_overlap_and_return(agent: TransferAgent) -> None:
    pool = await StagingPool.create(agent, 1 << 16)
    async with pool.lease(100, 1) as first, pool.lease(1000, 1) as second:
        assert (first.nbytes, second.nbytes) == (100, 1000)
        assert first.address % 64 == second.address % 64 == 0
        assert first.offset + first.nbytes <= second.offset or second.offset + second.nbytes <= first.offset
        assert pool.leased_bytes >= 1100
    assert pool.leased_bytes == 0
    async with pool.lease(pool.nbytes, 1):
        pass


async def test_waiters_are_served_in_order(agent: TransferAgent) -> None:
    pool = await StagingPool.create(agent, 4096)
    order: list[int] = []

    async def use(nbytes: int) -> None:
        async with pool.lease(nbytes, 10):
            order.append(nbytes)
            await asyncio.sleep(0)

    async with pool.lease(2048, 1):
        # The large one waits; the small ones behind it would fit, but must not overtake it.
        waiting = [asyncio.create_task(use(nbytes)) for nbytes in (4096, 64, 128)]
        for _ in range(5):
            await asyncio.sleep(0)
        assert order == []
    await asyncio.gather(*waiting)
    assert order == [4096, 64, 128]


async def test_deadline_cancellation_and_bounds(agent: TransferAgent) -> None:
    pool = await StagingPool.create(agent, 4096, max_waiters=1)
    with pytest.raises(TransferError, match="exceeds"):
        async with pool.lease(4097, 1):
            pass
    with pytest.raises(ValueError):
        async with pool.lease(0, 1):
            pass
    async with pool.lease(4096, 1):
        with pytest.raises(TransferTimeoutError, match="no room"):
            async with pool.lease(1, 0.01):
                pass
        waiting = asyncio.create_task(pool.lease(1, 10).__aenter__())
        await asyncio.sleep(0)
        with pytest.raises(TransferError, match="wait"):
            async with pool.lease(1, 1):
                pass
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    assert pool.leased_bytes == 0


async def test_a_waiter_that_gives_up_lets_those_behind_it_pass(agent: TransferAgent) -> None:
    pool = await StagingPool.create(agent, 4096)
    async with pool.lease(2048, 1):
        large = asyncio.create_task(pool.lease(4096, 10).__aenter__())
        await asyncio.sleep(0)
        small = asyncio.create_task(pool.lease(64, 10).__aenter__())
        await asyncio.sleep(0)
        large.cancel()
        assert (await small).nbytes == 64


async def test_closing_fails_whoever_waits(agent: TransferAgent) -> None:
    pool = await StagingPool.create(agent, 4096)
    async with pool.lease(4096, 1):
        waiting = asyncio.create_task(pool.lease(1, 10).__aenter__())
        await asyncio.sleep(0)
        await pool.close()
        with pytest.raises(TransferError, match="closed"):
            await waiting
    await pool.close()
    with pytest.raises(TransferError, match="closed"):
        async with pool.lease(1, 1):
            pass


async def test_a_lease_under_an_abandoned_transfer_returns_when_it_has_drained(agent: TransferAgent) -> None:
    if agent.stats().file_mode != "io_uring":
        pytest.skip("without io_uring a read from a pipe blocks inside NIXL")
    pool = await StagingPool.create(agent, 4096)
    read_end, write_end = os.pipe()
    pipe = await agent.register_file(read_end, 4096, owns_fd=True)
    with pytest.raises(TransferTimeoutError):
        async with pool.lease(4096, 1) as span:
            await agent.read_file([(pipe.span(0, 4096), span)], 0.2)
    assert pool.leased_bytes == 4096
    os.write(write_end, b"x" * 4096)
    async with pool.lease(4096, 10) as span:
        arrived = bytes(span.view) == b"x" * 4096
    # On a busy machine the deadline may pass before the read begins; its bytes are still in the pipe then.
    still_in_the_pipe = bool(select.select([read_end], [], [], 0)[0])
    assert arrived != still_in_the_pipe
