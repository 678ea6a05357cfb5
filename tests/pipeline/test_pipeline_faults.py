"""What the pipeline does when tiers, transfers or callers fail: never wrong KV, never a hang."""

import asyncio
import threading
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rig import BLOCK_SIZE, GEOMETRY, PARAMETERS, Rig, make_codec, open_rig

from dynamo_kvtc.codec.base import TierBlock
from dynamo_kvtc.codec.kvtc import KvtcCodec
from dynamo_kvtc.errors import (
    ChunkChecksumError,
    ObjectMissingError,
    OnboardCancelledError,
    OnboardError,
    TierFullError,
    TransferError,
    TransferTimeoutError,
)
from dynamo_kvtc.pipeline.blocks import SequenceBlocks
from dynamo_kvtc.pipeline.handle import OnboardHandle
from dynamo_kvtc.pipeline.onboard import OnboardSettings
from dynamo_kvtc.testing import FaultyTier, ThrottledTier, TierWrapper
from dynamo_kvtc.tiers.base import ReadRequest, Tier

#: Two layer groups of four units each: gets 1 to 4 are group 0, 5 to 8 group 1; get 0 reads the headers.
SETTINGS = OnboardSettings(timeout_s=10, units=8)
TOKENS = 128


async def stored_rig_onboard(rig: Rig) -> tuple[SequenceBlocks, OnboardHandle]:
    blocks = rig.sequence(TOKENS)
    await rig.store(blocks)
    return blocks, rig.adapter.onboard(blocks, rig.destination)


def assert_prefix_in_place(rig: Rig, blocks: SequenceBlocks, tokens: int) -> None:
    count = tokens // BLOCK_SIZE
    if count:
        rig.assert_in_place(SequenceBlocks(blocks.hashes[:count], blocks.block_ids[:count]))


async def assert_idle(rig: Rig) -> None:
    """Nothing is leaked: no staging memory leased, no pin held, nothing in flight."""
    for _ in range(200):
        if not rig.staging.leased_bytes and not rig.agent.stats().in_flight:
            break
        await asyncio.sleep(0.01)
    assert rig.staging.leased_bytes == 0
    assert rig.agent.stats().in_flight == 0
    assert all(stats.pinned_objects == 0 for stats in rig.adapter.status().tiers.values())


@pytest.mark.parametrize("get", range(9))
@pytest.mark.parametrize("fault", ["failing", "short"])
async def test_a_transfer_that_fails_in_the_middle_names_the_tokens(
    tmp_path: Path, get: int, fault: str
) -> None:
    def wrap(tier: Tier, name: str) -> Tier:
        if fault == "short":
            return FaultyTier(tier, short={get})
        return FaultyTier(tier, failing={get: TransferError("pulled the plug")})

    async with open_rig(tmp_path, tiers=("disk",), wrap=wrap, onboard=SETTINGS) as rig:
        blocks, handle = await stored_rig_onboard(rig)
        with pytest.raises(OnboardError) as caught:
            await handle.wait()
        # Get 0 reads all headers; behind it, unit n of a group is tier block n.
        ((start, stop),) = caught.value.tokens_to_recompute
        assert (start, stop) == (0 if get == 0 else 32 * ((get - 1) % 4), TOKENS)
        assert_prefix_in_place(rig, blocks, start)
        with pytest.raises(OnboardError):
            await handle.layer(GEOMETRY.num_layers - 1)
        await assert_idle(rig)
        missed = rig.adapter.status().counters.missed_blocks
        assert sum(missed.values()) == (TOKENS - start) // 32
        # The next try is served, as far as the tier still has what was not damaged.
        found = await rig.adapter.lookup(blocks.hashes)
        assert found == (TOKENS if fault == "failing" else start)


async def test_a_damaged_block_is_a_miss_and_can_be_offloaded_again(tmp_path: Path) -> None:
    async with open_rig(tmp_path, tiers=("host",), onboard=SETTINGS) as rig:
        blocks = rig.sequence(TOKENS)
        await rig.store(blocks)
        key = rig.adapter.keys(blocks.hashes)[2]
        size = rig.adapter.tiers.size_of(key)
        assert size is not None
        async with rig.staging.lease(size, timeout_s=5) as span:
            await rig.adapter.tiers.get([ReadRequest(key, 0, span)], timeout_s=5)
            header = rig.adapter.codec.read_header(span.view)
            span.view[header.chunks[-1].offset] ^= 0x10
            await rig.adapter.tiers.evict([key])
            assert await rig.adapter.tiers.put(key, span, timeout_s=5)
        with pytest.raises(OnboardError) as caught:
            await rig.adapter.onboard(blocks, rig.destination).wait()
        assert isinstance(caught.value.__cause__, ChunkChecksumError)
        assert caught.value.tokens_to_recompute == ((64, TOKENS),)
        assert rig.adapter.status().counters.missed_blocks["damaged"] == 2
        assert await rig.adapter.lookup(blocks.hashes) == 64
        await rig.store(blocks)
        await rig.adapter.onboard(blocks, rig.destination).wait()
        rig.assert_in_place(blocks)


async def test_an_object_of_another_key_is_a_miss(tmp_path: Path) -> None:
    async with open_rig(tmp_path, tiers=("host",)) as rig:
        blocks, other = rig.sequence(32), rig.sequence(32, name="b")
        (key,) = rig.adapter.keys(blocks.hashes)
        stream = make_codec("kvtc").encode(
            [TierBlock(*rig.source.gather(blocks.block_ids), 0, 4, rig.adapter.keys(other.hashes)[0])]
        )[0]
        async with rig.staging.lease(len(stream), timeout_s=5) as span:
            span.view[:] = stream
            assert await rig.adapter.tiers.put(key, span, timeout_s=5)
        with pytest.raises(OnboardError, match="recomputed"):
            await rig.adapter.onboard(blocks, rig.destination).wait()
        assert rig.adapter.status().counters.missed_blocks["mismatch"] == 1


async def test_blocks_evicted_between_lookup_and_onboard_are_a_miss(tmp_path: Path) -> None:
    async with open_rig(tmp_path, tiers=("host",), onboard=SETTINGS) as rig:
        blocks = rig.sequence(TOKENS)
        await rig.store(blocks)
        await rig.adapter.tiers.evict([rig.adapter.keys(blocks.hashes)[1]])
        with pytest.raises(OnboardError) as caught:
            await rig.adapter.onboard(blocks, rig.destination).wait()
        assert isinstance(caught.value.__cause__, ObjectMissingError)
        assert caught.value.tokens_to_recompute == ((32, TOKENS),)
        assert_prefix_in_place(rig, blocks, 32)


async def test_a_stuck_transfer_ends_at_the_onboards_deadline(tmp_path: Path) -> None:
    settings = OnboardSettings(timeout_s=0.3, units=8)
    async with open_rig(
        tmp_path, tiers=("disk",), wrap=lambda tier, _: FaultyTier(tier, stuck={3}), onboard=settings
    ) as rig:
        _, handle = await stored_rig_onboard(rig)
        with pytest.raises(OnboardError) as caught:
            await asyncio.wait_for(handle.wait(), 10)
        assert isinstance(caught.value.__cause__, TransferTimeoutError)
        await assert_idle(rig)


@pytest.mark.parametrize("delay_s", [0.0, 0.01, 0.03, 0.06, 0.1])
async def test_cancelling_releases_everything(tmp_path: Path, delay_s: float) -> None:
    async with open_rig(
        tmp_path, tiers=("disk",), wrap=lambda tier, _: FaultyTier(tier, delay_s=0.02), onboard=SETTINGS
    ) as rig:
        blocks, handle = await stored_rig_onboard(rig)
        waiting = asyncio.create_task(handle.layer(GEOMETRY.num_layers - 1))
        await asyncio.sleep(delay_s)
        await handle.cancel()
        with pytest.raises(OnboardError) as caught:
            await waiting
        assert isinstance(caught.value.__cause__, OnboardCancelledError)
        assert handle.done()
        before = [tensor.clone() for tensor in rig.destination.keys]
        await assert_idle(rig)
        for tensor, copy in zip(rig.destination.keys, before, strict=True):
            assert tensor.equal(copy) or tensor.isnan().equal(copy.isnan())
        # The pipeline goes on serving.
        await rig.adapter.onboard(blocks, rig.destination).wait()
        rig.assert_in_place(blocks)


async def test_an_onboard_cancelled_before_it_began_tells_its_waiters(tmp_path: Path) -> None:
    async with open_rig(tmp_path, tiers=("host",)) as rig:
        blocks, handle = await stored_rig_onboard(rig)
        waiting = asyncio.create_task(handle.wait())
        await handle.cancel()
        with pytest.raises(OnboardError) as caught:
            await asyncio.wait_for(waiting, 5)
        assert caught.value.tokens_to_recompute == ((0, TOKENS),)
        assert rig.adapter.status().counters.missed_blocks["cancelled"] == 4
        await rig.adapter.onboard(blocks, rig.destination).wait()


class SlowToStop(TierWrapper):
    """One read hangs, and ends some time after it was cancelled, as one in a thread does."""

    def __init__(self, inner: Tier, hangs: int) -> None:
        super().__init__(inner)
        self.hangs, self.gets = hangs, 0
        self.hanging, self.stopping, self.stopped = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def get(self, reads: Sequence[ReadRequest], *, timeout_s: float) -> None:
        self.gets += 1
        if self.gets - 1 != self.hangs:
            await self.inner.get(reads, timeout_s=timeout_s)
            return
        try:
            self.hanging.set()
            await asyncio.Event().wait()
        finally:
            self.stopping.set()
            await self.stopped.wait()


async def test_cancelling_again_while_a_request_ends_releases_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = OnboardSettings(timeout_s=60, units=8, transfers_in_flight=3)
    async with open_rig(
        tmp_path, tiers=("host",), wrap=lambda tier, _: SlowToStop(tier, 3), onboard=settings
    ) as rig:
        (tier,) = rig.adapter.tiers.tiers
        assert isinstance(tier, SlowToStop)
        host, go_on = rig.adapter.boundaries.host, threading.Event()
        opening = host.open_groups

        def open_later(*args: Any) -> Any:
            assert go_on.wait(60)
            return opening(*args)

        monkeypatch.setattr(host, "open_groups", open_later)
        # The first unit is being opened, the second has arrived, the third is under way.
        _, handle = await stored_rig_onboard(rig)
        await tier.hanging.wait()
        first = asyncio.create_task(handle.cancel())
        await asyncio.sleep(0.01)
        go_on.set()
        await tier.stopping.wait()
        second = asyncio.create_task(handle.cancel())
        await asyncio.sleep(0.01)
        tier.stopped.set()
        await asyncio.gather(first, second)
        assert rig.staging.leased_bytes == 0


@pytest.mark.parametrize("open_bytes", [1, 10_000, 1 << 30])
async def test_what_is_open_is_bounded_and_the_result_the_same(tmp_path: Path, open_bytes: int) -> None:
    settings = OnboardSettings(timeout_s=10, units=8, open_bytes=open_bytes)
    async with open_rig(tmp_path, tiers=("host",), onboard=settings) as rig:
        blocks, handle = await stored_rig_onboard(rig)
        await handle.wait()
        rig.assert_in_place(blocks)
        projected = [i.num_blocks for i in handle.timeline.intervals if i.stage == "project"]
        assert sum(projected) == 4 * GEOMETRY.num_layers
        if open_bytes == 1:
            assert set(projected) == {1}


async def test_a_waiter_that_gives_up_does_not_stop_the_onboard(tmp_path: Path) -> None:
    async with open_rig(
        tmp_path, tiers=("disk",), wrap=lambda tier, _: FaultyTier(tier, delay_s=0.02), onboard=SETTINGS
    ) as rig:
        blocks, handle = await stored_rig_onboard(rig)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(handle.layer(GEOMETRY.num_layers - 1), 0.01)
        await handle.wait()
        rig.assert_in_place(blocks)


async def test_a_slow_disk_overlaps_and_delivers_the_first_group_early(tmp_path: Path) -> None:
    async with open_rig(
        tmp_path, tiers=("disk",), wrap=lambda tier, _: ThrottledTier(tier, 3e4), onboard=SETTINGS
    ) as rig:
        blocks, handle = await stored_rig_onboard(rig)
        await handle.wait()
        rig.assert_in_place(blocks)
        intervals = handle.timeline.intervals
        transfers = {(i.group, i.first_block): i for i in intervals if i.stage == "transfer"}
        opens = {(i.group, i.first_block): i for i in intervals if i.stage == "open"}
        # The next unit is on its way while the present one is opened.
        units = sorted(opens)
        overlapping = [
            one for one, following in pairwise(units) if transfers[following].start < opens[one].stop
        ]
        assert len(overlapping) == len(units) - 1
        # Layer 0 is ready before the second group's last bytes have come.
        assert handle.timeline.layer_ready[0] < max(transfers[unit].stop for unit in units if unit[0] == 1)


async def test_a_failing_offload_drops_its_block_only(tmp_path: Path) -> None:
    faults = {1: TransferError("no"), 2: TierFullError("full")}
    async with open_rig(
        tmp_path, tiers=("host",), wrap=lambda tier, _: FaultyTier(tier, failing_puts=faults)
    ) as rig:
        blocks = rig.sequence(TOKENS)
        result = await rig.adapter.offload(blocks, rig.source).wait()
        assert (result.stored, result.dropped) == (2, 2)
        dropped = rig.adapter.status().counters.dropped_blocks
        assert (dropped["transfer"], dropped["tier_full"]) == (1, 1)
        assert await rig.adapter.lookup(blocks.hashes) == 32
        await rig.store(blocks)
        assert await rig.adapter.lookup(blocks.hashes) == TOKENS


async def test_one_unencodable_block_does_not_take_its_batch_with_it(tmp_path: Path) -> None:
    async with open_rig(tmp_path, tiers=("host",)) as rig:
        rig.source.keys[2][5, 3, 0, 0] = float("inf")  # engine block 5 is in tier block 1
        result = await rig.adapter.offload(rig.sequence(TOKENS), rig.source).wait()
        assert (result.stored, result.dropped) == (3, 1)
        assert rig.adapter.status().counters.dropped_blocks["unencodable"] == 1


async def test_back_pressure_drops_and_counts_and_never_blocks(tmp_path: Path) -> None:
    async with open_rig(tmp_path, tiers=("host",), queue_limit=3) as rig:
        tickets = [rig.adapter.offload(rig.sequence(TOKENS, name=str(i)), rig.source) for i in range(5)]
        results = [await ticket.wait() for ticket in tickets]
        assert sum(result.stored for result in results) == 3
        assert sum(result.dropped for result in results) == 17
        assert rig.adapter.status().counters.dropped_blocks["queue_full"] == 17
        # A prefix stays a prefix: what is dropped is behind what is kept.
        assert await rig.adapter.lookup(rig.sequence(TOKENS, name="0").hashes) == 96


async def test_blocks_may_be_reused_once_gathered(tmp_path: Path) -> None:
    async with open_rig(tmp_path, tiers=("host",)) as rig:
        blocks = rig.sequence(TOKENS)
        expected = rig.expected(blocks)
        ticket = rig.adapter.offload(blocks, rig.source)
        await ticket.gathered()
        for view in (*rig.source.keys, *rig.source.values):
            view.fill_(float("nan"))
        await ticket.wait()
        await rig.adapter.onboard(blocks, rig.destination).wait()
        keys, values = rig.destination.gather(blocks.block_ids)
        assert keys.equal(expected[0]) and values.equal(expected[1])


class SlowCodec(KvtcCodec):
    """A codec that takes its time, so that closing finds offloads waiting."""

    def encode(self, blocks: Sequence[TierBlock]) -> list[bytes]:
        import time

        time.sleep(0.05)
        return super().encode(blocks)


async def test_closing_ends_every_waiter(tmp_path: Path) -> None:
    codec = SlowCodec(PARAMETERS, ratio=4.0, threads=1)
    async with open_rig(
        tmp_path,
        codec=codec,
        wrap=lambda tier, _: FaultyTier(tier, delay_s=0.05),
        onboard=SETTINGS,
    ) as rig:
        blocks = rig.sequence(TOKENS)
        await rig.store(blocks)
        handle = rig.adapter.onboard(blocks, rig.destination)
        tickets = [rig.adapter.offload(rig.sequence(TOKENS, name=str(i)), rig.source) for i in range(8)]
        await asyncio.sleep(0.02)
        await asyncio.wait_for(rig.adapter.close(), 20)
        results = [await asyncio.wait_for(ticket.wait(), 1) for ticket in tickets]
        assert all(result.stored + result.dropped == 4 for result in results)
        assert sum(result.dropped for result in results) > 0
        with pytest.raises(OnboardError):
            await asyncio.wait_for(handle.wait(), 1)
