"""The object tier and a server that dies, stalls, lies and refuses: a miss or a typed error, in time."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

pytest.importorskip("obstore", reason="needs obstore: pip install 'dynamo-kvtc[object]'")

from bucket_faults import FaultyBucket
from s3_server import Answer, FaultyProxy, S3Server

from dynamo_kvtc.errors import (
    ObjectCorruptError,
    ObjectMissingError,
    StoreUnavailableError,
    TransferError,
    TransferTimeoutError,
)
from dynamo_kvtc.testing.conformance import TierDriver, object_bytes, object_key
from dynamo_kvtc.testing.fault_suite import TierFaultSuite
from dynamo_kvtc.tiers import BucketPlace, HostTier, ObjectSettings, ObjectTier, ReadRequest, Tier, TierStack
from dynamo_kvtc.tiers.encrypted import EncryptedTier
from dynamo_kvtc.tiers.encryption_keys import KeyRing, MasterKey
from dynamo_kvtc.tiers.object_client import AccessDeniedError, BucketClient
from dynamo_kvtc.tiers.object_format import HEADER_BYTES, object_name
from dynamo_kvtc.transfer import StagingPool, TransferAgent

SIZE = 40_000


class TestOwnedObjectTierUnderFaults(TierFaultSuite):
    """Every fault of the suite, as a bucket shows it."""

    # The proxy's ends of connections are in this process, too.
    kept_descriptors = 24

    @pytest_asyncio.fixture
    async def transfer(self, s3: S3Server) -> AsyncIterator[FaultyBucket]:
        async with await TransferAgent.create() as agent:
            self.bucket = FaultyBucket(agent, s3.endpoint)
            yield self.bucket
            self.bucket.stop()

    async def open_tier(self, agent: TransferAgent, folder: Path, capacity_bytes: int) -> Tier:
        return await self.open_bucket(folder, capacity_bytes)

    async def open_bucket(self, folder: Path, capacity_bytes: int | None) -> ObjectTier:
        where = BucketPlace("kvtc", prefix="/".join(folder.parts[-2:]), endpoint=self.bucket.endpoint)
        # The bucket is asked anew at every lookup: what it has is what counts.
        settings = ObjectSettings(timeout_s=5.0, lookup_wait_s=20.0, miss_ttl_s=0.0, transport="client")
        return await ObjectTier.open(where, capacity_bytes, settings=settings)


class TestSharedObjectTierUnderFaults(TestOwnedObjectTierUnderFaults):
    async def open_tier(self, agent: TransferAgent, folder: Path, capacity_bytes: int) -> Tier:
        return await self.open_bucket(folder, None)


class TestEncryptedObjectTierUnderFaults(TestOwnedObjectTierUnderFaults):
    async def open_tier(self, agent: TransferAgent, folder: Path, capacity_bytes: int) -> Tier:
        pytest.importorskip(
            "cryptography", reason="needs cryptography: pip install 'dynamo-kvtc[encryption]'"
        )
        ring = KeyRing(MasterKey("test", bytes(range(32))))
        staging = await StagingPool.create(agent, 1 << 20)
        return EncryptedTier(await self.open_bucket(folder, capacity_bytes), ring, staging)


REFUSALS = {
    "500": b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
    "503": b"HTTP/1.1 503 Slow Down\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
    "403": b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
    "nonsense": b"SMTP ready\r\n\r\n",
    "nothing": b"",
}


@pytest_asyncio.fixture
async def proxy(s3: S3Server) -> AsyncIterator[FaultyProxy]:
    proxy = await FaultyProxy(s3.endpoint).start()
    yield proxy
    await proxy.stop()


@pytest.fixture
def where(proxy: FaultyProxy, tmp_path: Path) -> BucketPlace:
    return BucketPlace("kvtc", prefix="/".join(tmp_path.parts[-2:]), endpoint=proxy.endpoint)


@pytest_asyncio.fixture
async def worker(where: BucketPlace, staging: StagingPool) -> AsyncIterator[TierDriver]:
    """A worker with object 0 stored, whose requests may take three seconds."""
    settings = ObjectSettings(timeout_s=3.0, lookup_wait_s=20.0, transport="client")
    tier = await ObjectTier.open(where, settings=settings)
    driver = TierDriver(tier, staging)
    await driver.put(0, SIZE)
    yield driver
    await tier.close()
    await asyncio.sleep(0)
    others = [task for task in asyncio.all_tasks() if "kvtc" in task.get_name()]
    assert not others
    gc.collect()


def tier_of(driver: TierDriver) -> ObjectTier:
    assert isinstance(driver.tier, ObjectTier)
    return driver.tier


async def recovered(driver: TierDriver) -> None:
    """The breaker lets a request pass again, and everything works."""
    tier_of(driver).breaker.succeeded()
    assert await driver.get(0, 0, SIZE) == object_bytes(0, SIZE)
    assert await driver.put(50, SIZE)
    assert await driver.prefix(0) == 1


@pytest.mark.parametrize("answer", REFUSALS)
async def test_refused_requests_are_typed_errors_and_open_the_breaker(
    worker: TierDriver, proxy: FaultyProxy, answer: str
) -> None:
    proxy.refuse = REFUSALS[answer]
    kind = AccessDeniedError if answer == "403" else TransferError
    for _ in range(2):
        with pytest.raises(kind):
            await worker.get(0, 0, 100)
    with pytest.raises(kind):
        await worker.put(1, SIZE)
    assert tier_of(worker).breaker.state == "open"
    asked = len(proxy.requests)
    with pytest.raises(StoreUnavailableError, match="next try in"):
        await worker.get(0, 0, 100) if worker.tier.size_of(object_key(0)) else await worker.put(2, SIZE)
    assert await worker.prefix(0) == 0
    assert worker.tier.size_of(object_key(0)) is None
    assert len(proxy.requests) == asked
    proxy.refuse = None
    await recovered(worker)


async def test_a_killed_server_and_its_return(worker: TierDriver, proxy: FaultyProxy) -> None:
    await proxy.stop()
    for number in range(3):
        with pytest.raises(TransferError):
            await worker.put(10 + number, SIZE)
    assert tier_of(worker).breaker.state == "open"
    await proxy.again()
    await recovered(worker)


async def test_a_server_killed_in_the_middle_of_everything(worker: TierDriver, proxy: FaultyProxy) -> None:
    proxy.delay_s = 0.2
    using = [asyncio.ensure_future(worker.get(0, 0, SIZE)) for _ in range(8)]
    using += [asyncio.ensure_future(worker.put(20 + number, SIZE)) for number in range(8)]  # type: ignore[arg-type]
    await asyncio.sleep(0.1)
    await proxy.stop()
    results = await asyncio.wait_for(asyncio.gather(*using, return_exceptions=True), 30)
    assert all(isinstance(result, TransferError) for result in results), results
    proxy.delay_s = 0.0
    await proxy.again()
    await recovered(worker)


async def test_a_stuck_server_costs_the_deadline_and_no_more(worker: TierDriver, proxy: FaultyProxy) -> None:
    proxy.stuck = True
    with pytest.raises(TransferTimeoutError):
        await worker.get(0, 0, 100, timeout_s=0.2)
    # The caller's short patience says nothing about the server.
    assert tier_of(worker).breaker.state == "closed"
    results = await asyncio.gather(*(worker.get(0, 0, 100) for _ in range(3)), return_exceptions=True)
    assert all(isinstance(result, TransferTimeoutError) for result in results)
    assert tier_of(worker).breaker.state == "open"
    proxy.stuck = False
    await recovered(worker)


async def test_a_stuck_lookup_is_a_miss_in_time(where: BucketPlace, proxy: FaultyProxy) -> None:
    settings = ObjectSettings(timeout_s=30.0, lookup_wait_s=0.1, transport="client")
    tier = await ObjectTier.open(where, settings=settings)
    proxy.stuck = True
    assert await asyncio.wait_for(tier.contains_prefix([object_key(n) for n in range(9)]), 10) == 0
    await tier.close()


def cut(answer: Answer) -> None:
    """The body ends early, with the connection."""
    answer.body, answer.close_early = answer.body[: len(answer.body) // 2], True


def shorten(answer: Answer) -> None:
    """The body is short, and the header agrees."""
    length = len(answer.body)
    answer.head = answer.head.replace(b"%d\r\n" % length, b"%d\r\n" % (length - 3))
    answer.body = answer.body[:-3]


def flip(answer: Answer) -> None:
    """One bit is wrong."""
    answer.body = answer.body[:-10] + bytes([answer.body[-10] ^ 1]) + answer.body[-9:]


async def test_a_body_that_breaks_off_is_an_error(worker: TierDriver, proxy: FaultyProxy) -> None:
    proxy.fault = cut
    with pytest.raises(TransferError):
        await worker.get(0, 0, SIZE)
    proxy.fault = None
    await recovered(worker)


async def test_a_damaged_object_is_dropped_and_can_be_stored_anew(
    worker: TierDriver, proxy: FaultyProxy
) -> None:
    proxy.fault = lambda answer: flip(answer) if answer.method == "GET" else None
    with pytest.raises(ObjectCorruptError):
        await worker.get(0, 0, SIZE)
    proxy.fault = None
    assert worker.tier.size_of(object_key(0)) is None
    assert worker.tier.stats().corrupt_dropped == 1
    assert await worker.prefix(0) == 0
    assert await worker.put(0, SIZE)
    await recovered(worker)


@pytest.mark.parametrize("nbytes", [1000, SIZE])
async def test_a_short_range_is_no_data(worker: TierDriver, proxy: FaultyProxy, nbytes: int) -> None:
    proxy.fault = lambda answer: shorten(answer) if answer.method == "GET" else None
    with pytest.raises((ObjectCorruptError, TransferError)):
        await worker.get(0, 0, nbytes)


async def test_an_object_that_was_cut_short_in_the_bucket(worker: TierDriver, where: BucketPlace) -> None:
    client = BucketClient(where, 10.0)
    name = object_name(object_key(0))
    half = bytes(await client.get_range(name, 0, SIZE // 2, 10.0))
    await client.put(name, half, 10.0, only_new=False)
    with pytest.raises(ObjectCorruptError):
        await worker.get(0, SIZE - 1000, 500)
    assert worker.tier.size_of(object_key(0)) is None
    assert await worker.put(0, SIZE)


async def test_another_object_under_the_name_is_found_out(worker: TierDriver, where: BucketPlace) -> None:
    client = BucketClient(where, 10.0)
    await worker.put(1, SIZE)
    other = bytes(await client.get_range(object_name(object_key(1)), 0, SIZE + HEADER_BYTES, 10.0))
    await client.put(object_name(object_key(0)), other, 10.0, only_new=False)
    with pytest.raises(ObjectCorruptError, match="another object"):
        await worker.get(0, 0, SIZE)


async def test_cancelling_at_any_moment_leaves_the_tier_whole(worker: TierDriver, proxy: FaultyProxy) -> None:
    proxy.delay_s = 0.02
    for turns in range(0, 30, 3):
        task = asyncio.ensure_future(worker.get(0, 0, SIZE))
        put = asyncio.ensure_future(worker.put(100 + turns, SIZE))
        for _ in range(turns):
            await asyncio.sleep(0.002)
        task.cancel()
        put.cancel()
        await asyncio.gather(task, put, return_exceptions=True)
    proxy.delay_s = 0.0
    assert worker.staging.leased_bytes == 0
    await recovered(worker)
    assert tier_of(worker).breaker.openings == 0


async def test_deletions_that_fail_are_given_up_and_counted(
    worker: TierDriver, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dynamo_kvtc.tiers import object_deletion

    monkeypatch.setattr(object_deletion, "_PAUSE_S", 0.0)
    proxy.refuse = REFUSALS["503"]
    assert await worker.tier.evict([object_key(0)]) == 1
    assert await tier_of(worker)._deletions.settled(object_key(0), 20.0)
    assert tier_of(worker)._deletions.given_up == 1


async def test_a_stack_serves_on_without_its_bucket(
    worker: TierDriver, proxy: FaultyProxy, agent: TransferAgent, staging: StagingPool
) -> None:
    stack = TierStack([await HostTier.open(agent, 1 << 20), worker.tier], staging=staging)
    await proxy.stop()
    async with staging.lease(SIZE, 5.0) as span:
        for number in range(1, 6):
            span.view[:] = object_bytes(number, SIZE)
            assert await stack.put(object_key(number), span, timeout_s=10.0)
        assert await stack.contains_prefix([object_key(number) for number in range(1, 6)]) == 5
        await stack.get([ReadRequest(object_key(3), 0, span)], timeout_s=10.0)
        assert bytes(span.view) == object_bytes(3, SIZE)
        assert stack.failed_puts == 5
        await stack.tiers[0].evict([object_key(1)])
        with pytest.raises(ObjectMissingError):
            await stack.get([ReadRequest(object_key(1), 0, span)], timeout_s=10.0)
    await stack.tiers[0].close()
