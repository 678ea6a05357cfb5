"""The object tier over NIXL's OBJ backend; run by `test_tiers_object_nixl`, in a process with its plugins."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from bucket_faults import FaultyBucket

from dynamo_kvtc.errors import ObjectMissingError, StoreUnavailableError, TransferError
from dynamo_kvtc.testing.conformance import TierConformance, TierDriver, object_bytes, object_key
from dynamo_kvtc.testing.fault_suite import TierFaultSuite
from dynamo_kvtc.tiers import BucketPlace, ObjectSettings, ObjectTier, Tier
from dynamo_kvtc.tiers.object_client import BucketClient
from dynamo_kvtc.tiers.object_format import object_name
from dynamo_kvtc.transfer import StagingPool, TransferAgent

ENDPOINT = os.environ["KVTC_TEST_S3"]
SETTINGS = ObjectSettings(transport="nixl", lookup_wait_s=20.0)
SIZE = 40_000


def place(folder: Path) -> BucketPlace:
    return BucketPlace("kvtc", prefix="/".join(folder.parts[-2:]), endpoint=ENDPOINT)


class TestObjectTierOverNixl(TierConformance):
    persistent = True
    writes_arrive_late = True  # a transfer of NIXL cannot be called back

    async def open_tier(self, agent: TransferAgent, folder: Path, capacity_bytes: int) -> Tier:
        tier = await ObjectTier.open(place(folder), capacity_bytes, settings=SETTINGS)
        assert tier.transport == "nixl"
        return tier


class TestObjectTierOverNixlUnderFaults(TierFaultSuite):
    # Those of the backend's own connections, and the proxy's ends of them.
    kept_descriptors = 48

    @pytest_asyncio.fixture
    async def transfer(self) -> AsyncIterator[FaultyBucket]:
        async with await TransferAgent.create() as agent:
            self.bucket = FaultyBucket(agent, ENDPOINT)
            yield self.bucket
            self.bucket.stop()

    async def open_tier(self, agent: TransferAgent, folder: Path, capacity_bytes: int) -> Tier:
        where = BucketPlace("kvtc", prefix="/".join(folder.parts[-2:]), endpoint=self.bucket.endpoint)
        settings = ObjectSettings(timeout_s=5.0, lookup_wait_s=20.0, miss_ttl_s=0.0, transport="nixl")
        tier = await ObjectTier.open(where, capacity_bytes, settings=settings)
        assert tier.transport == "nixl"
        return tier


async def test_both_transports_read_what_either_wrote(staging: StagingPool, tmp_path: Path) -> None:
    over_nixl = TierDriver(await ObjectTier.open(place(tmp_path), settings=SETTINGS), staging)
    client = ObjectSettings(transport="client", lookup_wait_s=20.0)
    over_client = TierDriver(await ObjectTier.open(place(tmp_path), settings=client), staging)
    await over_nixl.put(0, SIZE)
    await over_client.put(1, SIZE)
    for driver in (over_nixl, over_client):
        assert await driver.prefix(0, 1) == 2
        for number in (0, 1):
            assert await driver.get(number, 7, 1000) == object_bytes(number, SIZE)[7:1007]
            assert await driver.get(number, 0, SIZE) == object_bytes(number, SIZE)
        await driver.tier.close()


async def test_nixl_writes_where_the_bucket_ignores_conditions(staging: StagingPool, tmp_path: Path) -> None:
    tier = await ObjectTier.open(place(tmp_path), settings=SETTINGS)
    tier._conditional = False  # what the trial at start finds on such a server
    driver = TierDriver(tier, staging)
    assert await driver.put(0, SIZE)
    assert await driver.get(0, 0, SIZE) == object_bytes(0, SIZE)
    other = await ObjectTier.open(place(tmp_path), settings=SETTINGS)
    other._conditional = False
    assert not await TierDriver(other, staging).put(0, SIZE)
    await tier.close()
    await other.close()


async def test_objects_beyond_the_memory_come_over_the_client(staging: StagingPool, tmp_path: Path) -> None:
    small = ObjectSettings(transport="nixl", transport_bytes=8192, lookup_wait_s=20.0)
    driver = TierDriver(await ObjectTier.open(place(tmp_path), settings=small), staging)
    await driver.put(0, SIZE)
    assert await driver.get(0, 0, SIZE) == object_bytes(0, SIZE)
    assert await driver.get(0, 5, 100) == object_bytes(0, SIZE)[5:105]
    await driver.tier.close()


async def test_an_object_deleted_behind_the_tier_is_missing(staging: StagingPool, tmp_path: Path) -> None:
    driver = TierDriver(await ObjectTier.open(place(tmp_path), settings=SETTINGS), staging)
    await driver.put(0, SIZE)
    await BucketClient(place(tmp_path), 10.0).delete([object_name(object_key(0))], 10.0)
    with pytest.raises(ObjectMissingError):
        await driver.get(0, 0, 100)
    assert driver.tier.size_of(object_key(0)) is None
    await driver.tier.close()


async def test_a_dead_server_opens_the_breaker(staging: StagingPool, tmp_path: Path) -> None:
    nowhere = BucketPlace("kvtc", endpoint="http://127.0.0.1:9")
    tier = await ObjectTier.open(nowhere, settings=ObjectSettings(transport="nixl", timeout_s=1.0))
    driver = TierDriver(tier, staging)
    for _ in range(2):
        tier._note_found(object_key(0), SIZE)
        with pytest.raises(TransferError):
            await driver.get(0, 0, 100)
    with pytest.raises(StoreUnavailableError):
        await driver.put(1, SIZE)
    await tier.close()
