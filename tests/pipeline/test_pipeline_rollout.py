"""A new artifact or release beside an old one, on real tiers: streams never mix, old ones age out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from rig import BLOCK_SIZE, GEOMETRY, PARAMETERS, POLICY, Rig, make_cache, make_parameters

from dynamo_kvtc.codec import bitstream
from dynamo_kvtc.codec.header import StreamHeader
from dynamo_kvtc.codec.kvtc import KvtcCodec
from dynamo_kvtc.codec.parameters import KvtcParameters
from dynamo_kvtc.codec.raw import RawCodec
from dynamo_kvtc.errors import OnboardError
from dynamo_kvtc.pipeline.adapter import TierAdapter
from dynamo_kvtc.tiers.disk import DiskSettings, DiskTier
from dynamo_kvtc.tiers.host import HostTier
from dynamo_kvtc.tiers.shared import SharedDiskTier
from dynamo_kvtc.tiers.stack import TierStack
from dynamo_kvtc.transfer.agent import TransferAgent
from dynamo_kvtc.transfer.staging import StagingPool

OLD = PARAMETERS
NEW = replace(make_parameters(GEOMETRY, groups=2, ratios=(4.0,), seed=9), artifact_id=bytes(range(32, 64)))
DISK = 4 << 20


@asynccontextmanager
async def worker(
    folder: Path, parameters: KvtcParameters | None, *, disk: int = DISK, shared: bool = False
) -> AsyncIterator[Rig]:
    """One release: a process with its artifact, over the folder that the one before left. None is raw."""
    codec = KvtcCodec(parameters, ratio=4.0, threads=1) if parameters else RawCodec(GEOMETRY)
    async with AsyncExitStack() as opened:
        agent = await opened.enter_async_context(await TransferAgent.create())
        staging = await StagingPool.create(agent, 4 << 20)
        host = await HostTier.open(agent, 1 << 20)
        tier = await (SharedDiskTier if shared else DiskTier).open(
            agent, folder, disk, settings=DiskSettings(segment_bytes=1 << 20)
        )
        adapter = await opened.enter_async_context(
            TierAdapter(
                codec,
                parameters.artifact_id if parameters else bytes(32),
                agent,
                staging,
                TierStack([host, tier], staging=staging),
                POLICY,
                BLOCK_SIZE,
                store_timeout_s=10,
            )
        )
        yield Rig(adapter, agent, staging, make_cache(64, filled=True), make_cache(64, filled=False))


async def test_old_objects_are_misses_for_a_new_artifact_and_going_back_finds_them(tmp_path: Path) -> None:
    async with worker(tmp_path, OLD) as old:
        blocks = old.sequence(256)
        await old.store(blocks)
        assert await old.adapter.lookup(blocks.hashes) == 256
    async with worker(tmp_path, NEW) as new:
        assert await new.adapter.lookup(blocks.hashes) == 0
        with pytest.raises(OnboardError) as caught:
            await new.adapter.onboard(blocks, new.destination).wait()
        assert caught.value.tokens_to_recompute == ((0, 256),)
        assert new.destination.gather(blocks.block_ids)[0].isnan().all()  # nothing was touched
        await new.store(blocks)
        await new.adapter.onboard(blocks, new.destination).wait()
        new.assert_in_place(blocks)  # what its own codec makes of them, not the other's
        assert {header.artifact_id for header in await new.adapter.headers(blocks.hashes)} == {
            NEW.artifact_id
        }
    async with worker(tmp_path, OLD) as back:
        assert await back.adapter.lookup(blocks.hashes) == 256
        await back.adapter.onboard(blocks, back.destination).wait()
        back.assert_in_place(blocks)
        assert {header.artifact_id for header in await back.adapter.headers(blocks.hashes)} == {
            OLD.artifact_id
        }


async def test_raw_and_compressed_workers_never_share(tmp_path: Path) -> None:
    async with worker(tmp_path, None) as raw:
        blocks = raw.sequence(128)
        await raw.store(blocks)
    async with worker(tmp_path, NEW) as new:
        assert await new.adapter.lookup(blocks.hashes) == 0
        await new.store(blocks)
    async with worker(tmp_path, None) as raw:
        await raw.adapter.onboard(blocks, raw.destination).wait()
        raw.assert_in_place(blocks)


async def test_old_and_new_workers_share_a_folder_while_a_rollout_lasts(tmp_path: Path) -> None:
    async with worker(tmp_path, OLD, shared=True) as old, worker(tmp_path, NEW, shared=True) as new:
        blocks = old.sequence(128)
        await old.store(blocks)
        assert await new.adapter.lookup(blocks.hashes) == 0
        await new.store(blocks)
        for rig, artifact in ((old, OLD), (new, NEW)):
            await rig.adapter.onboard(blocks, rig.destination).wait()
            rig.assert_in_place(blocks)
            headers = await rig.adapter.headers(blocks.hashes)
            assert {header.artifact_id for header in headers} == {artifact.artifact_id}
    # A pod of the new release that comes up later finds what its own kind wrote.
    async with worker(tmp_path, NEW, shared=True) as later:
        await later.adapter.onboard(blocks, later.destination).wait()
        later.assert_in_place(blocks)


async def test_old_objects_age_out_within_the_capacity(tmp_path: Path) -> None:
    small = 1 << 20
    async with worker(tmp_path, OLD, disk=small) as old:
        first = old.sequence(512, name="old")
        await old.store(first)
    async with worker(tmp_path, NEW, disk=small) as new:
        for number in range(64):
            blocks = new.sequence(512, name=f"new{number}")
            await new.store(blocks)
            disk = new.adapter.status().tiers["disk"]
            assert disk.allocated_bytes <= small
            if disk.evictions >= 2 * 512 // POLICY.tier_block_tokens:
                break
        assert disk.evictions  # the capacity was reached
        assert await new.adapter.lookup(blocks.hashes) == 512  # the newest are there
    async with worker(tmp_path, OLD, disk=small) as back:
        assert await back.adapter.lookup(first.hashes) == 0  # nothing had to be deleted by hand


async def test_streams_of_another_format_are_misses_and_make_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later release, whose streams have another version, over the objects of this one.

    There is only one version so far: the later release is this code with another number in its headers.
    """
    async with worker(tmp_path, OLD) as before:
        blocks = before.sequence(64)
        await before.store(blocks)
    version = bitstream.VERSION + 1
    defaults = StreamHeader.__init__.__defaults__
    assert defaults[-1] == bitstream.VERSION
    monkeypatch.setattr(StreamHeader.__init__, "__defaults__", (*defaults[:-1], version))
    monkeypatch.setattr(bitstream, "VERSION", version)
    async with worker(tmp_path, OLD) as later:
        for start in (0, 32):  # each miss drops the object that caused it, so that it can be stored anew
            with pytest.raises(OnboardError) as caught:
                await later.adapter.onboard(blocks, later.destination).wait()
            assert caught.value.tokens_to_recompute == ((start, 64),)
            assert later.destination.gather(blocks.block_ids)[0][start:].isnan().all()
            await later.store(blocks)
        await later.adapter.onboard(blocks, later.destination).wait()
        later.assert_in_place(blocks)
        assert {header.version for header in await later.adapter.headers(blocks.hashes)} == {version}
