"""The object tier on a real S3 server: the conformance kit, workers that share a bucket."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import pytest_asyncio

pytest.importorskip("obstore", reason="needs obstore: pip install 'dynamo-kvtc[object]'")

from s3_server import FaultyProxy, S3Server

from dynamo_kvtc.errors import ObjectMissingError, TierError
from dynamo_kvtc.testing.conformance import TierConformance, TierDriver, object_bytes, object_key
from dynamo_kvtc.testing.stateful import check_tier_against_model
from dynamo_kvtc.tiers import BucketPlace, Namespace, ObjectSettings, ObjectTier, ReadRequest, Tier
from dynamo_kvtc.tiers import encryption_format as form
from dynamo_kvtc.tiers.encrypted import EncryptedTier
from dynamo_kvtc.tiers.encryption_keys import KeyRing, MasterKey
from dynamo_kvtc.tiers.object_client import BucketClient
from dynamo_kvtc.transfer import StagingPool, TransferAgent

SIZE = 40_000
PATIENT = ObjectSettings(lookup_wait_s=20.0, transport="client")

Open = Callable[..., Awaitable[TierDriver]]


def place(server: S3Server | FaultyProxy, folder: Path, **changes: str) -> BucketPlace:
    """Return a prefix of its own for a test's folder."""
    prefix = "/".join(folder.parts[-2:])
    return BucketPlace(**{"bucket": "kvtc", "prefix": prefix, "endpoint": server.endpoint} | changes)


class TestOwnedObjectTier(TierConformance):
    persistent = True
    writes_arrive_late = True  # the request may be at the server already

    @pytest.fixture(autouse=True)
    def _server(self, s3: S3Server) -> None:
        self.server = s3

    async def open_tier(self, agent: TransferAgent, folder: Path, capacity_bytes: int) -> Tier:
        return await ObjectTier.open(place(self.server, folder), capacity_bytes, settings=PATIENT)


class TestEncryptedObjectTier(TestOwnedObjectTier):
    def stored_size(self, nbytes: int) -> int:
        return form.sealed_size(nbytes)

    async def open_tier(self, agent: TransferAgent, folder: Path, capacity_bytes: int) -> Tier:
        pytest.importorskip(
            "cryptography", reason="needs cryptography: pip install 'dynamo-kvtc[encryption]'"
        )
        inner = await super().open_tier(agent, folder, capacity_bytes)
        ring = KeyRing(MasterKey("test", bytes(range(32))))
        return EncryptedTier(inner, ring, await StagingPool.create(agent, 4 << 20))


def test_tier_agrees_with_the_model(s3: S3Server) -> None:
    async def open_tier(agent: TransferAgent, folder: Path, capacity_bytes: int) -> Tier:
        return await ObjectTier.open(place(s3, folder), capacity_bytes, settings=PATIENT)

    # A bucket tells when an object was written to the second only.
    check_tier_against_model(open_tier, persistent=True, keeps_order=False)


@pytest_asyncio.fixture
async def proxy(s3: S3Server) -> AsyncIterator[FaultyProxy]:
    proxy = await FaultyProxy(s3.endpoint).start()
    yield proxy
    await proxy.stop()


@pytest_asyncio.fixture
async def open_shared(proxy: FaultyProxy, staging: StagingPool, tmp_path: Path) -> AsyncIterator[Open]:
    """Open workers on one shared prefix, through the proxy; keywords are settings."""
    opened: list[ObjectTier] = []

    async def open_tier(**settings: object) -> TierDriver:
        chosen = ObjectSettings(**{"lookup_wait_s": 20.0, "transport": "client", **settings})  # type: ignore[arg-type]
        tier = await ObjectTier.open(place(proxy, tmp_path), settings=chosen)
        opened.append(tier)
        return TierDriver(tier, staging)

    yield open_tier
    for tier in opened:
        await tier.close()


async def test_what_one_worker_stores_the_others_find(open_shared: Open) -> None:
    writer, reader = await open_shared(), await open_shared()
    for number in range(7):
        await writer.put(number, SIZE)
    assert reader.tier.size_of(object_key(0)) is None
    assert await reader.prefix(*range(10)) == 7
    assert reader.tier.size_of(object_key(6)) == SIZE
    assert await reader.get(6, 100, 5000) == object_bytes(6, SIZE)[100:5100]
    assert await reader.get(3, 0, SIZE) == object_bytes(3, SIZE)


async def test_tenants_of_one_bucket_never_meet(open_shared: Open) -> None:
    writer, reader = await open_shared(), await open_shared()
    keys = {salt: Namespace(bytes(32), "", salt).key(b"one prefix") for salt in (b"", b"a", b"ab")}
    for worker, salt in ((writer, b"a"), (reader, b"ab")):
        async with worker.staging.lease(SIZE, 5.0) as span:
            span.view[:] = salt.ljust(SIZE)
            assert await worker.tier.put(keys[salt], span, timeout_s=10.0)
    assert await writer.tier.contains_prefix([keys[b""]]) == 0
    for worker in (writer, reader):
        for salt in (b"a", b"ab"):
            assert await worker.tier.contains_prefix([keys[salt]]) == 1
            async with worker.staging.lease(SIZE, 5.0) as span:
                await worker.tier.get([ReadRequest(keys[salt], 0, span)], timeout_s=10.0)
                assert bytes(span.view) == salt.ljust(SIZE)


async def test_the_first_writer_of_a_key_wins(open_shared: Open) -> None:
    workers = [await open_shared() for _ in range(4)]
    results = await asyncio.gather(*(worker.put(0, SIZE) for worker in workers))
    assert sorted(results) == [False, False, False, True]
    assert sum(worker.tier.stats().puts for worker in workers) == 1
    for worker in workers:
        assert await worker.get(0, 0, SIZE) == object_bytes(0, SIZE)


async def test_a_lookup_of_what_nobody_stored_asks_once(open_shared: Open, proxy: FaultyProxy) -> None:
    worker = await open_shared(miss_ttl_s=3600.0)
    for _ in range(3):
        assert await worker.prefix(*range(100)) == 0
    assert proxy.count("HEAD") == 1


async def test_a_missing_key_is_asked_for_again_after_a_while(open_shared: Open) -> None:
    writer, reader = await open_shared(), await open_shared(miss_ttl_s=0.0)
    assert await reader.prefix(0) == 0
    await writer.put(0, SIZE)
    assert await reader.prefix(0) == 1


async def test_a_known_prefix_costs_no_request(open_shared: Open, proxy: FaultyProxy) -> None:
    worker = await open_shared()
    for number in range(3):
        await worker.put(number, SIZE)
    before = len(proxy.requests)
    assert await worker.prefix(0, 1, 2) == 3
    assert len(proxy.requests) == before


async def test_a_slow_bucket_does_not_hold_a_lookup_up(open_shared: Open, proxy: FaultyProxy) -> None:
    writer, reader = await open_shared(), await open_shared(lookup_wait_s=0.0)
    await writer.put(0, SIZE)
    assert await reader.prefix(0) == 0
    # The question went on behind its back.
    for _ in range(200):
        if reader.tier.size_of(object_key(0)) is not None:
            break
        await asyncio.sleep(0.05)
    assert await reader.prefix(0) == 1


async def test_lookups_of_one_prefix_share_their_question(open_shared: Open, proxy: FaultyProxy) -> None:
    writer, reader = await open_shared(), await open_shared()
    await writer.put(0, SIZE)
    assert await asyncio.gather(*(reader.prefix(0, 1) for _ in range(20))) == [1] * 20
    assert proxy.count("HEAD") <= 2


async def test_an_expired_object_is_a_miss(open_shared: Open, tmp_path: Path, proxy: FaultyProxy) -> None:
    worker, other = await open_shared(miss_ttl_s=0.0), await open_shared()
    await worker.put(0, SIZE)
    await other.prefix(0)
    await other.tier.evict([object_key(0)])
    await other.tier.close()
    with pytest.raises(ObjectMissingError):
        await worker.get(0, 0, 100)
    assert await worker.prefix(0) == 0
    assert worker.tier.stats().corrupt_dropped == 0
    assert await worker.put(0, SIZE)


async def test_what_comes_and_goes_is_told(open_shared: Open) -> None:
    writer, reader = await open_shared(), await open_shared(most_known=2)
    told: list[tuple[int, bool]] = []
    numbers = {object_key(number): number for number in range(4)}
    writer.tier.watch(lambda key, stored: told.append((numbers[key], stored)))
    reader.tier.watch(lambda key, stored: told.append((10 + numbers[key], stored)))
    for number in range(3):
        await writer.put(number, 100)
    assert told == [(0, True), (1, True), (2, True)]
    told.clear()
    await reader.prefix(0)
    await reader.prefix(1)
    await reader.prefix(2)
    assert told == [(10, True), (11, True), (12, True), (10, False)]
    told.clear()
    await writer.tier.evict([object_key(1)])
    await writer.tier.close()
    with pytest.raises(ObjectMissingError):
        await reader.get(1, 0, 10)
    assert told == [(1, False), (11, False)]


async def test_a_shared_index_has_a_bound(open_shared: Open) -> None:
    writer, reader = await open_shared(), await open_shared(most_known=4)
    for number in range(8):
        await writer.put(number, 100)
    await reader.prefix(*range(8))
    assert reader.tier.stats().objects == 4
    assert await reader.prefix(7) == 1


async def test_what_is_no_object_of_ours_is_left_alone(
    s3: S3Server, staging: StagingPool, tmp_path: Path
) -> None:
    client = BucketClient(place(s3, tmp_path), 10.0)
    for name in ("readme.txt", "ab/cd", f"zz/{'0' * 62}"):
        await client.put(name, b"something else", 10.0, only_new=True)
    tier = await ObjectTier.open(place(s3, tmp_path), 1 << 20, settings=PATIENT)
    assert tier.stats().objects == 0
    await tier.clear()
    await tier.close()
    names = [name async for page in client.list_sizes(10.0) for name, _ in page]
    assert sorted(names) == ["ab/cd", "readme.txt", f"zz/{'0' * 62}"]


async def test_an_owner_evicts_down_to_a_smaller_capacity(
    s3: S3Server, staging: StagingPool, tmp_path: Path
) -> None:
    tier = await ObjectTier.open(place(s3, tmp_path), 1 << 20, settings=PATIENT)
    driver = TierDriver(tier, staging)
    for number in range(10):
        await driver.put(number, SIZE)
    await tier.close()
    smaller = await ObjectTier.open(place(s3, tmp_path), 3 * SIZE, settings=PATIENT)
    assert smaller.stats().objects == 2
    await smaller.close()
    client = BucketClient(place(s3, tmp_path), 10.0)
    assert len(list(itertools.chain(*[page async for page in client.list_sizes(10.0)]))) == 2


async def test_a_bucket_that_is_not_there_or_denies_access_is_refused_at_start(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TierError, match="no bucket"):
        await ObjectTier.open(place(s3, tmp_path, bucket="absent"), settings=PATIENT)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "kvtc-test-reader")
    with pytest.raises(TierError, match="denies access"):
        await ObjectTier.open(place(s3, tmp_path), settings=PATIENT)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(TierError, match="denies access") as refusal:
        await ObjectTier.open(place(s3, tmp_path), settings=PATIENT)
    assert "wrong" not in str(refusal.value)


async def test_an_owner_needs_its_bucket_at_start_and_a_sharer_does_not(tmp_path: Path) -> None:
    nowhere = BucketPlace("kvtc", endpoint="http://127.0.0.1:9")
    with pytest.raises(TierError, match="cannot use"):
        await ObjectTier.open(nowhere, 1 << 20, settings=PATIENT)
    tier = await ObjectTier.open(nowhere, settings=PATIENT)
    assert await tier.contains_prefix([object_key(0)]) == 0
    await tier.close()
