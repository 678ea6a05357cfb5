"""Tenants with different salts never meet, in any tier, whatever prefixes their sequences share."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rig import GEOMETRY, open_rig

from dynamo_kvtc.errors import ObjectMissingError, OnboardError
from dynamo_kvtc.pipeline.adapter import TierAdapter
from dynamo_kvtc.tiers import DiskTier, HostTier, Namespace, ReadRequest, SharedDiskTier, Tier
from dynamo_kvtc.tiers.breaker_tier import BreakerTier
from dynamo_kvtc.transfer import StagingPool, TransferAgent

#: The same text, so the same sequence hashes, for everybody. Salts are prefixes of each other, and of hashes.
SALTS = [b"", b"a", b"ab", b"b", b"tenant", b"tenant\0", b"tenant:0", b"0:", bytes(32)]
HASHES = [b"shared prefix %d" % index for index in range(4)]
SIZE = 5000

Open = Callable[[TransferAgent, Path], Awaitable[Tier]]


async def host(agent: TransferAgent, folder: Path) -> Tier:
    return await HostTier.open(agent, 1 << 20)


async def disk(agent: TransferAgent, folder: Path) -> Tier:
    return await DiskTier.open(agent, folder / "disk", 4 << 20)


async def shared_disk(agent: TransferAgent, folder: Path) -> Tier:
    return await SharedDiskTier.open(agent, folder / "shared", 4 << 20)


async def encrypted(agent: TransferAgent, folder: Path) -> Tier:
    pytest.importorskip("cryptography", reason="needs cryptography: pip install 'dynamo-kvtc[encryption]'")
    from dynamo_kvtc.tiers.encrypted import EncryptedTier
    from dynamo_kvtc.tiers.encryption_keys import KeyRing, MasterKey

    ring = KeyRing(MasterKey("new", bytes(range(32))), MasterKey("old", bytes(32)))
    return EncryptedTier(await host(agent, folder), ring, await StagingPool.create(agent, 1 << 20))


async def guarded(agent: TransferAgent, folder: Path) -> Tier:
    return BreakerTier(await host(agent, folder), await StagingPool.create(agent, 1 << 20))


def keys_of(salt: bytes) -> list[bytes]:
    return [Namespace(bytes(32), "layout", salt).key(sequence_hash) for sequence_hash in HASHES]


@pytest.mark.parametrize(
    "open_tier", [host, disk, shared_disk, encrypted, guarded], ids=lambda open_tier: open_tier.__name__
)
async def test_colliding_prefixes_stay_apart_in_every_tier(open_tier: Open, tmp_path: Path) -> None:
    async with await TransferAgent.create() as agent:
        staging = await StagingPool.create(agent, 1 << 20)
        tier = await open_tier(agent, tmp_path)
        for count, salt in enumerate(SALTS):
            # Everything that others have stored is invisible.
            assert await tier.contains_prefix(keys_of(salt)) == 0
            assert tier.size_of(keys_of(salt)[0]) is None
            async with staging.lease(SIZE, 5.0) as span:
                with pytest.raises(ObjectMissingError):
                    await tier.get([ReadRequest(keys_of(salt)[0], 0, span)], timeout_s=10.0)
                for key in keys_of(salt):
                    span.view[:] = bytes([count]) * SIZE
                    assert await tier.put(key, span, timeout_s=10.0)
        for count, salt in enumerate(SALTS):
            assert await tier.contains_prefix(keys_of(salt)) == len(HASHES)
            async with staging.lease(SIZE, 5.0) as span:
                await tier.get([ReadRequest(keys_of(salt)[3], 0, span)], timeout_s=10.0)
                assert bytes(span.view) == bytes([count]) * SIZE
        # One tenant's eviction touches nobody else.
        assert await tier.evict(keys_of(SALTS[1])) == len(HASHES)
        assert await tier.contains_prefix(keys_of(SALTS[2])) == len(HASHES)
        await tier.close()
        await staging.close()


@given(
    first=st.tuples(st.binary(max_size=12), st.binary(max_size=12), st.binary(max_size=12)),
    second=st.tuples(st.binary(max_size=12), st.binary(max_size=12), st.binary(max_size=12)),
)
def test_a_key_depends_on_both_salts_and_the_hash_each_by_itself(
    first: tuple[bytes, bytes, bytes], second: tuple[bytes, bytes, bytes]
) -> None:
    """Moving bytes from one part to its neighbour gives another key."""

    def key(process: bytes, request: bytes, sequence_hash: bytes) -> bytes:
        adapter = SimpleNamespace(
            codec=SimpleNamespace(geometry=GEOMETRY),
            policy=SimpleNamespace(tier_block_tokens=32, sink_tokens=4),
            _artifact_id=bytes(32),
            _salt=process,
        )
        return TierAdapter.namespace(adapter, request).key(sequence_hash)  # type: ignore[arg-type]

    assert (key(*first) == key(*second)) == (first == second)
    a, b, c = first
    for moved in ((a + b, b"", c), (b"", a + b, c), (a, b + c, b""), (a, b"", b + c)):
        assert (key(*moved) == key(*first)) == (moved == first)


@asynccontextmanager
async def two_tenants(folder: Path):  # type: ignore[no-untyped-def]
    async with open_rig(folder) as rig:
        mine = rig.sequence(96, salt=b"mine")
        theirs = rig.sequence(96, salt=b"theirs")
        await rig.store(theirs)
        yield rig, mine, theirs


async def test_a_lookup_cannot_tell_another_tenants_block_from_none(tmp_path: Path) -> None:
    async with two_tenants(tmp_path) as (rig, mine, theirs):
        unknown = rig.sequence(96, name="never stored", salt=b"mine")
        answers = []
        for blocks in (mine, unknown):
            before = rig.adapter.status().counters.to_dict()
            found = await rig.adapter.lookup(blocks.hashes, salt=blocks.salt)
            with pytest.raises(OnboardError) as failure:
                await rig.adapter.onboard(blocks, rig.destination).wait()
            after = rig.adapter.status().counters.to_dict()
            moved = {
                name: after[name] - before[name]
                for name in ("looked_up_blocks", "found_blocks", "onboarded_blocks")
            }
            cause = type(failure.value.__cause__)
            answers.append((found, failure.value.tokens_to_recompute, cause, moved))
        assert answers[0] == answers[1]
        assert answers[0][0] == 0
        keys, values = rig.destination.gather(mine.block_ids)
        assert torch.isnan(keys).all() and torch.isnan(values).all()
        assert await rig.adapter.lookup(theirs.hashes, salt=b"theirs") == 96


async def test_storing_the_same_text_does_not_tell_that_another_tenant_has_it(tmp_path: Path) -> None:
    async with two_tenants(tmp_path) as (rig, mine, _):
        result = await rig.adapter.offload(mine, rig.source).wait()
        assert (result.stored, result.already_stored) == (3, 0)


async def test_bytes_moved_under_another_tenants_key_are_a_miss(tmp_path: Path) -> None:
    """Whoever can write to the store can give one tenant another's object; its header names its key."""
    async with two_tenants(tmp_path) as (rig, mine, theirs):
        stack = rig.adapter.tiers
        pairs = zip(
            rig.adapter.keys(theirs.hashes, salt=b"theirs"),
            rig.adapter.keys(mine.hashes, salt=b"mine"),
            strict=True,
        )
        for source, target in pairs:
            size = stack.size_of(source)
            async with rig.staging.lease(size, 5.0) as span:
                await stack.get([ReadRequest(source, 0, span)], timeout_s=10.0)
                await stack.put(target, span, timeout_s=10.0)
        assert await rig.adapter.lookup(mine.hashes, salt=b"mine") == 96
        with pytest.raises(OnboardError) as failure:
            await rig.adapter.onboard(mine, rig.destination).wait()
        assert failure.value.tokens_to_recompute == ((0, 96),)
        assert torch.isnan(rig.destination.gather(mine.block_ids)[0]).all()


def test_tenants_of_one_key_each() -> None:
    seen = list(itertools.chain(*map(keys_of, SALTS)))
    assert len(set(seen)) == len(seen)
