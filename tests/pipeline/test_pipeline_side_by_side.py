"""A batch's objects are stored side by side where each of them waits for a remote store."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from rig import Rig, open_rig

from dynamo_kvtc.errors import TransferError
from dynamo_kvtc.testing import TierWrapper
from dynamo_kvtc.tiers.base import Tier, TierKey
from dynamo_kvtc.transfer.memory import MemorySpan


class Remote(TierWrapper):
    """Holds every put until the test lets it go on; fails those of some keys."""

    def __init__(self, inner: Tier) -> None:
        super().__init__(inner)
        self.under_way: list[TierKey] = []
        self.fails: set[TierKey] = set()
        self.open = asyncio.Event()
        self.changed = asyncio.Event()

    async def put(self, key: TierKey, source: MemorySpan, *, timeout_s: float) -> bool:
        self.under_way.append(key)
        self.changed.set()
        try:
            await self.open.wait()
            if key in self.fails:
                raise TransferError("the bucket says no")
            return await self.inner.put(key, source, timeout_s=timeout_s)
        finally:
            self.under_way.remove(key)

    async def expect(self, count: int) -> None:
        """Wait until so many puts are under way, and see that it stays so."""
        while len(self.under_way) < count:
            self.changed.clear()
            await asyncio.wait_for(self.changed.wait(), 60)
        await asyncio.sleep(0.05)
        assert len(self.under_way) == count


def remote(rig: Rig) -> Remote:
    (tier,) = rig.adapter.tiers.tiers
    assert isinstance(tier, Remote)
    return tier


@pytest.mark.parametrize("at_once", [1, 3, 8])
async def test_a_batch_is_stored_side_by_side_within_bounds(tmp_path: Path, at_once: int) -> None:
    async with open_rig(
        tmp_path,
        tiers=("host",),
        wrap=lambda tier, _: Remote(tier),
        stores_at_once=at_once,
        store_timeout_s=120,
    ) as rig:
        blocks, bucket = rig.sequence(256), remote(rig)
        keys = rig.adapter.keys(blocks.hashes)
        bucket.fails = {keys[1]}
        ticket = rig.adapter.offload(blocks, rig.source)
        # Batches are of four; what is encoded next waits until this one is stored.
        await bucket.expect(min(at_once, 4))
        bucket.open.set()
        result = await ticket.wait()
        # One that fails drops itself only.
        assert (result.stored, result.dropped) == (7, 1)
        assert [bucket.size_of(key) is not None for key in keys] == [True, False, *[True] * 6]
        assert rig.staging.leased_bytes == 0


async def test_closing_waits_for_what_is_being_stored(tmp_path: Path) -> None:
    async with open_rig(
        tmp_path, tiers=("host",), wrap=lambda tier, _: Remote(tier), stores_at_once=4, store_timeout_s=120
    ) as rig:
        bucket = remote(rig)
        ticket = rig.adapter.offload(rig.sequence(512), rig.source)
        await bucket.expect(4)
        closing = asyncio.create_task(rig.adapter.close())
        await asyncio.sleep(0.05)
        assert not closing.done()
        bucket.open.set()
        await closing
        result = await ticket.wait()
        assert result.stored >= 4 and result.stored + result.dropped == 16
        assert rig.staging.leased_bytes == 0


async def test_a_reset_waits_for_what_is_being_stored_and_forgets_it(tmp_path: Path) -> None:
    async with open_rig(
        tmp_path, tiers=("host",), wrap=lambda tier, _: Remote(tier), stores_at_once=4, store_timeout_s=120
    ) as rig:
        bucket, blocks = remote(rig), rig.sequence(128)
        rig.adapter.offload(blocks, rig.source)
        await bucket.expect(4)
        resetting = asyncio.create_task(rig.adapter.reset())
        await asyncio.sleep(0.05)
        assert not resetting.done()
        bucket.open.set()
        await resetting
        assert not any(bucket.size_of(key) for key in rig.adapter.keys(blocks.hashes))
        assert rig.staging.leased_bytes == 0
