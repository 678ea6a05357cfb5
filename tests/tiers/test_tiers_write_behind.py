"""Writing into a bucket behind the caller's back: side by side, within bounds, claimed when it is done."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

pytest.importorskip("obstore", reason="needs obstore: pip install 'dynamo-kvtc[object]'")

from s3_server import FaultyProxy, S3Server

from dynamo_kvtc.errors import TierClosedError, TransferTimeoutError
from dynamo_kvtc.testing import TierWrapper
from dynamo_kvtc.testing.conformance import object_bytes, object_key
from dynamo_kvtc.testing.fault_suite import LeakCheck
from dynamo_kvtc.testing.transfer_faults import cancel_at_every_await
from dynamo_kvtc.tiers import BucketPlace, HostTier, ObjectSettings, ObjectTier, ReadRequest, Tier, TierStack
from dynamo_kvtc.tiers.write_behind import WriteBehind
from dynamo_kvtc.transfer import MemorySpan, StagingPool, TransferAgent

SIZE = 20_000
ROOM = 10
BUSY = b"HTTP/1.1 503 Slow Down\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class Counting(TierWrapper):
    """Counts the puts under way, and lets them pass while it is open."""

    under_way = most_under_way = 0

    def __init__(self, inner: Tier) -> None:
        super().__init__(inner)
        self.open = asyncio.Event()
        self.open.set()

    async def put(self, key: bytes, source: MemorySpan, *, timeout_s: float) -> bool:
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            await self.open.wait()
            return await self.inner.put(key, source, timeout_s=timeout_s)
        finally:
            self.under_way -= 1


@dataclass
class Stacked:
    """A host tier over a bucket that is written to behind, with room for ten objects on their way."""

    stack: TierStack
    behind: WriteBehind
    bucket: Counting
    staging: StagingPool
    memory: StagingPool
    agent: TransferAgent

    async def put(self, number: int) -> bool:
        async with self.staging.lease(SIZE, 10) as span:
            span.view[:] = object_bytes(number, SIZE)
            return await self.stack.put(object_key(number), span, timeout_s=10)

    async def get(self, tier: Tier | TierStack, number: int) -> bytes:
        async with self.staging.lease(SIZE, 10) as span:
            await tier.get([ReadRequest(object_key(number), 0, span)], timeout_s=10)
            return bytes(span.view)

    def in_bucket(self, *numbers: int) -> list[bool]:
        return [self.bucket.size_of(object_key(number)) is not None for number in numbers]


@pytest_asyncio.fixture
async def proxy(s3: S3Server) -> AsyncIterator[FaultyProxy]:
    proxy = await FaultyProxy(s3.endpoint).start()
    yield proxy
    await proxy.stop()


def where(proxy: FaultyProxy, folder: Path) -> BucketPlace:
    return BucketPlace("kvtc", prefix="/".join(folder.parts[-2:]), endpoint=proxy.endpoint)


@pytest_asyncio.fixture
async def stacked(
    agent: TransferAgent, staging: StagingPool, proxy: FaultyProxy, tmp_path: Path
) -> AsyncIterator[Stacked]:
    settings = ObjectSettings(timeout_s=3.0, lookup_wait_s=20.0, miss_ttl_s=0.0, transport="client")
    bucket = Counting(await ObjectTier.open(where(proxy, tmp_path), settings=settings))
    memory = await StagingPool.create(agent, ROOM * SIZE, alignment=1)
    behind = WriteBehind(bucket, memory, at_once=4, timeout_s=20.0)
    host = await HostTier.open(agent, 4 << 20)
    stack = TierStack([host, bucket], staging=staging, behind={bucket.name: behind})
    yield Stacked(stack, behind, bucket, staging, memory, agent)
    await stack.close()
    assert memory.leased_bytes == 0
    assert not [task for task in asyncio.all_tasks() if "write-behind" in task.get_name()]


async def test_puts_do_not_wait_and_uploads_go_side_by_side(stacked: Stacked) -> None:
    stacked.bucket.open.clear()
    for number in range(ROOM):
        assert await stacked.put(number)
    # The host tier has them all; nothing claims that the bucket has any.
    assert stacked.in_bucket(*range(ROOM)) == [False] * ROOM
    stats = stacked.stack.stats()["object"]
    assert (stats.waiting, stats.puts, stats.objects) == (ROOM, 0, 0)
    assert stacked.memory.leased_bytes == ROOM * SIZE
    with pytest.raises(TransferTimeoutError, match="10 objects were not written"):
        await stacked.stack.flush(0.2)
    assert stacked.bucket.under_way == 4
    stacked.bucket.open.set()
    await stacked.stack.flush(20)
    assert stacked.in_bucket(*range(ROOM)) == [True] * ROOM
    assert stacked.bucket.most_under_way == 4
    stats = stacked.stack.stats()["object"]
    assert (stats.waiting, stats.puts, stacked.stack.failed_puts) == (0, ROOM, 0)
    for number in range(ROOM):
        assert await stacked.get(stacked.bucket, number) == object_bytes(number, SIZE)


async def test_another_worker_finds_an_object_once_it_is_flushed_and_not_before(
    stacked: Stacked, proxy: FaultyProxy, tmp_path: Path
) -> None:
    settings = ObjectSettings(lookup_wait_s=20.0, miss_ttl_s=0.0, transport="client")
    other = await ObjectTier.open(where(proxy, tmp_path), settings=settings)
    told: list[bool] = []
    stacked.bucket.watch(lambda key, stored: told.append(stored))
    stacked.bucket.open.clear()
    await stacked.put(0)
    assert told == [] and await other.contains_prefix([object_key(0)]) == 0
    stacked.bucket.open.set()
    await stacked.stack.flush(20)
    assert told == [True] and await other.contains_prefix([object_key(0)]) == 1
    assert await stacked.get(other, 0) == object_bytes(0, SIZE)
    await other.close()


async def test_what_does_not_fit_into_the_queue_is_dropped_and_counted(stacked: Stacked) -> None:
    stacked.bucket.open.clear()
    for number in range(ROOM + 5):
        assert await asyncio.wait_for(stacked.put(number), 10)
    assert stacked.stack.stats()["object"].not_admitted == {"queue_full": 5}
    assert not await stacked.behind.take(object_key(0), await _span(stacked, 0))  # on its way already
    assert stacked.behind.waiting == ROOM
    stacked.bucket.open.set()
    await stacked.stack.flush(20)
    assert stacked.in_bucket(*range(ROOM + 5)) == [True] * ROOM + [False] * 5
    # What was dropped can be put again.
    for number in range(ROOM, ROOM + 5):
        await stacked.put(number)
    await stacked.stack.flush(20)
    assert stacked.in_bucket(*range(ROOM, ROOM + 5)) == [True] * 5


async def _span(stacked: Stacked, number: int) -> MemorySpan:
    span = stacked.staging.try_lease(SIZE)
    assert span is not None
    span.view[:] = object_bytes(number, SIZE)
    return span


async def test_an_object_that_no_faster_tier_took_is_uploaded_before_the_put_returns(
    stacked: Stacked, proxy: FaultyProxy, agent: TransferAgent
) -> None:
    host = await HostTier.open(agent, SIZE // 2, name="tiny")
    stack = TierStack([host, stacked.bucket], behind={stacked.bucket.name: stacked.behind})
    assert await stack.put(object_key(0), await _span(stacked, 0), timeout_s=10)
    assert stacked.in_bucket(0) == [True] and stacked.behind.waiting == 0
    proxy.refuse = BUSY
    with pytest.raises(Exception, match="exceeds the tiny tier"):
        await stack.put(object_key(1), await _span(stacked, 1), timeout_s=10)
    await host.close()


async def test_a_failing_bucket_costs_uploads_and_opens_its_breaker(
    stacked: Stacked, proxy: FaultyProxy
) -> None:
    proxy.refuse = BUSY
    for number in range(ROOM):
        assert await stacked.put(number)
    await stacked.stack.flush(20)
    asked = proxy.count("PUT")
    assert stacked.bucket.inner.breaker.state == "open"  # type: ignore[attr-defined]
    assert stacked.stack.failed_puts == ROOM
    for number in range(ROOM, 2 * ROOM):
        assert await stacked.put(number)
    await stacked.stack.flush(20)
    assert proxy.count("PUT") == asked  # nobody asks a bucket that is left alone
    assert stacked.stack.failed_puts == 2 * ROOM
    proxy.refuse = None
    stacked.bucket.inner.breaker.succeeded()  # type: ignore[attr-defined]
    for number in range(2 * ROOM):
        assert await stacked.get(stacked.stack, number) == object_bytes(number, SIZE)
    await stacked.put(50)
    await stacked.stack.flush(20)
    assert stacked.in_bucket(50) == [True]


async def test_what_waits_too_long_is_dropped_within_its_deadline(
    stacked: Stacked, proxy: FaultyProxy
) -> None:
    stacked.behind._timeout_s = 0.3
    proxy.stuck = True
    for number in range(ROOM):
        await stacked.put(number)
    await asyncio.wait_for(stacked.stack.flush(20), 20)
    dropped = stacked.behind.dropped
    # Four were under way and ran into their deadlines; the turn of the others came too late.
    assert dropped["failed"] >= 4 and dropped["failed"] + dropped["too_late"] == ROOM
    # The caller's short patience says nothing about the server.
    assert stacked.bucket.inner.breaker.state == "closed"  # type: ignore[attr-defined]
    proxy.stuck = False


async def test_what_is_evicted_or_cleared_is_not_uploaded_afterwards(stacked: Stacked) -> None:
    stacked.bucket.open.clear()
    for number in range(6):
        await stacked.put(number)
    assert await stacked.stack.evict([object_key(0), object_key(5)]) == 2
    stacked.bucket.open.set()
    await stacked.stack.flush(20)
    assert stacked.in_bucket(*range(6)) == [False, True, True, True, True, False]
    stacked.bucket.open.clear()
    for number in range(6, 10):
        await stacked.put(number)
    await stacked.stack.clear()
    stacked.bucket.open.set()
    await stacked.stack.flush(1)
    assert stacked.in_bucket(*range(10)) == [False] * 10
    assert stacked.behind.waiting == stacked.memory.leased_bytes == 0


async def test_closing_writes_what_waits_and_takes_no_more(stacked: Stacked, proxy: FaultyProxy) -> None:
    proxy.delay_s = 0.1
    for number in range(6):
        await stacked.put(number)
    await stacked.behind.close()
    assert stacked.in_bucket(*range(6)) == [True] * 6
    assert not await stacked.behind.take(object_key(7), await _span(stacked, 7))
    await stacked.stack.close()
    with pytest.raises(TierClosedError):
        await stacked.put(8)


async def test_closing_does_not_wait_for_a_stuck_bucket_for_ever(
    stacked: Stacked, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dynamo_kvtc.tiers.write_behind._CLOSE_TIMEOUT_S", 0.1)
    proxy.stuck = True
    for number in range(6):
        await stacked.put(number)
    await asyncio.wait_for(stacked.behind.close(), 10)
    assert stacked.memory.leased_bytes == 0 and stacked.behind.dropped["too_late"] == 6


@pytest.mark.parametrize("large", [False, True])
async def test_a_put_cancelled_at_every_await_leaves_nothing(
    stacked: Stacked, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    if large:
        monkeypatch.setattr("dynamo_kvtc.tiers.write_behind._LARGE_COPY_BYTES", 1)
    await stacked.put(100)
    await stacked.stack.flush(20)
    leaks = LeakCheck(stacked.agent, stacked.staging, stacked.stack.tiers[0])

    async def after(ended: bool) -> None:
        await stacked.stack.flush(20)
        if any(stacked.in_bucket(0)):
            assert await stacked.get(stacked.bucket, 0) == object_bytes(0, SIZE)
        assert all(stacked.in_bucket(0)) or not ended
        await stacked.stack.evict([object_key(0)])
        assert stacked.memory.leased_bytes == 0
        # Connections to the server may stay open, with what serves them here.
        await leaks.settle(allow={"bytes beside objects": 64, "file descriptors": 24, "tasks": 12})

    assert await cancel_at_every_await(lambda: stacked.put(0), after) > 0


async def test_uploads_taken_back_at_any_moment_leave_nothing(stacked: Stacked, proxy: FaultyProxy) -> None:
    proxy.delay_s = 0.01
    for turns in range(0, 30, 3):
        for number in range(ROOM):
            await stacked.put(1000 * turns + number)
        for _ in range(turns):
            await asyncio.sleep(0.002)
        await stacked.behind.forget()
        assert stacked.behind.waiting == stacked.memory.leased_bytes == stacked.bucket.under_way == 0
    assert stacked.bucket.inner.breaker.openings == 0  # type: ignore[attr-defined]
    proxy.delay_s = 0.0
    await stacked.put(5)
    await stacked.stack.flush(20)
    assert stacked.in_bucket(5) == [True]
