"""Runs from the middle of a sequence, offloads that are given up, resets that let nothing through."""

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from rig import BLOCK_SIZE, open_rig

from dynamo_kvtc.errors import LayoutError, OnboardError
from dynamo_kvtc.pipeline.blocks import SequenceBlocks
from dynamo_kvtc.testing.wrappers import TierWrapper
from dynamo_kvtc.tiers.base import ReadRequest

STEP = 32 // BLOCK_SIZE  # blocks of a tier block


def part(blocks: SequenceBlocks, first: int, last: int) -> SequenceBlocks:
    return SequenceBlocks(blocks.hashes[first:last], blocks.block_ids[first:last], blocks.salt, first)


async def test_a_sequence_offloaded_in_runs_is_the_one_offloaded_whole(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        whole = rig.sequence(96)
        await rig.store(part(whole, 0, STEP))
        await rig.store(part(whole, STEP, 3 * STEP))
        assert await rig.adapter.lookup(whole.hashes) == 96
        await rig.adapter.onboard(whole, rig.destination).wait()
        rig.assert_in_place(whole)


async def test_a_run_is_onboarded_from_the_middle(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        whole = rig.sequence(96)
        await rig.store(whole)
        ids = [-1, *whole.block_ids[STEP + 1 :]]
        run = SequenceBlocks(whole.hashes[STEP:], ids, b"", STEP)
        await rig.adapter.onboard(run, rig.destination).wait()
        keys, _ = rig.destination.gather(whole.block_ids[STEP + 1 :])
        expected, _ = rig.expected(whole)
        assert keys.equal(expected[32 + BLOCK_SIZE :])
        untouched, _ = rig.destination.gather(whole.block_ids[: STEP + 1])
        assert untouched.isnan().all()


async def test_a_failed_run_names_tokens_of_the_sequence(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        whole = rig.sequence(96)
        await rig.store(part(whole, 0, 2 * STEP))
        with pytest.raises(OnboardError) as caught:
            await rig.adapter.onboard(part(whole, STEP, 3 * STEP), rig.destination).wait()
        assert caught.value.tokens_to_recompute == ((64, 96),)


async def test_a_run_that_begins_inside_a_tier_block_is_refused(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        whole = rig.sequence(96)
        with pytest.raises(LayoutError, match="first of a tier block"):
            rig.adapter.onboard(part(whole, 1, 2 * STEP), rig.destination)


def hold_gathers(rig: Any) -> tuple[threading.Event, threading.Event]:
    """Make the source's gathers wait; returns what says that one has begun, and what lets it end."""
    begun, go = threading.Event(), threading.Event()
    gather = rig.source.gather

    def held(block_ids: Any) -> Any:
        copied = gather(block_ids)
        begun.set()
        assert go.wait(20)
        return copied

    rig.source.gather = held
    return begun, go


async def test_nothing_is_stored_of_blocks_given_up_while_they_were_gathered(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        begun, go = hold_gathers(rig)
        ticket = rig.adapter.offload(rig.sequence(64), rig.source)
        await asyncio.to_thread(begun.wait, 20)
        assert not ticket.is_gathered()
        ticket.void()
        go.set()
        result = await ticket.wait()
        assert (result.stored, result.dropped) == (0, 2)
        assert rig.adapter.counters.snapshot().dropped_blocks["cancelled"] == 2
        assert await rig.adapter.lookup(rig.sequence(64).hashes) == 0


async def test_sequences_that_share_a_prefix_encode_it_once(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        begun, go = hold_gathers(rig)
        first = rig.adapter.offload(rig.sequence(64), rig.source)
        await asyncio.to_thread(begun.wait, 20)
        second = rig.adapter.offload(rig.sequence(96), rig.source)
        go.set()
        assert (await first.wait()).stored == 2
        result = await second.wait()
        assert (result.stored, result.already_stored) == (1, 2)


async def test_reset_lets_nothing_through_that_was_on_its_way(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        begun, go = hold_gathers(rig)
        working = rig.adapter.offload(rig.sequence(64), rig.source)
        await asyncio.to_thread(begun.wait, 20)
        waiting = rig.adapter.offload(rig.sequence(64, name="b"), rig.source)
        reset = asyncio.create_task(rig.adapter.reset())
        await asyncio.sleep(0)
        go.set()
        await reset
        assert working.is_finished() and waiting.is_finished()
        for name in "ab":
            assert await rig.adapter.lookup(rig.sequence(64, name=name).hashes) == 0


async def test_reset_ends_onboards(tmp_path: Path) -> None:
    reading = asyncio.Event()

    class Stuck(TierWrapper):
        async def get(self, reads: list[ReadRequest], *, timeout_s: float) -> None:  # type: ignore[override]
            reading.set()
            await asyncio.sleep(3600)

    async with open_rig(tmp_path, tiers=("host",), wrap=lambda tier, _: Stuck(tier)) as rig:
        await rig.store(rig.sequence(64))
        handle = rig.adapter.onboard(rig.sequence(64), rig.destination)
        await reading.wait()
        await rig.adapter.reset()
        assert handle.done() and isinstance(handle.error(), OnboardError)
        assert await rig.adapter.lookup(rig.sequence(64).hashes) == 0
