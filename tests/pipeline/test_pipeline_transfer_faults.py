"""The pipeline under every fault of a transfer: right KV, or exactly the tokens to recompute."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest
from rig import BLOCK_SIZE, Rig, open_rig

from dynamo_kvtc.errors import OnboardError
from dynamo_kvtc.pipeline.blocks import SequenceBlocks
from dynamo_kvtc.pipeline.onboard import OnboardSettings
from dynamo_kvtc.testing import FAULTS, FaultyTransfer, cancel_at_every_await
from dynamo_kvtc.testing.fault_suite import LeakCheck
from dynamo_kvtc.testing.transfer_faults import Fault
from dynamo_kvtc.tiers.base import Tier

SETTINGS = OnboardSettings(timeout_s=0.5, units=8)
TOKENS = 128


def faulty(rig: Rig) -> FaultyTransfer:
    assert isinstance(rig.agent, FaultyTransfer)
    return rig.agent


def leak_check(rig: Rig) -> LeakCheck:
    class AllTiers:
        """Counts of all tiers in one, as far as `LeakCheck` looks at them."""

        def stats(self) -> object:
            every = rig.adapter.tiers.stats().values()
            names = ("pinned_objects", "allocated_bytes", "stored_bytes")
            return SimpleNamespace(**{name: sum(getattr(stats, name) for stats in every) for name in names})

    tiers: Tier = AllTiers()  # type: ignore[assignment]
    return LeakCheck(rig.agent, rig.staging, tiers)


async def onboard_or_know(rig: Rig, blocks: SequenceBlocks) -> int:
    """Onboard; return how many leading tokens are in place, after looking at them."""
    tokens = len(blocks.hashes) * BLOCK_SIZE
    try:
        await asyncio.wait_for(rig.adapter.onboard(blocks, rig.destination).wait(), 20)
    except OnboardError as error:
        ((tokens, stop),) = error.tokens_to_recompute
        assert stop == len(blocks.hashes) * BLOCK_SIZE
    count = tokens // BLOCK_SIZE
    if count:
        rig.assert_in_place(SequenceBlocks(blocks.hashes[:count], blocks.block_ids[:count]))
    return tokens


@pytest.mark.parametrize("tiers", [("host",), ("disk",), ("host", "disk")], ids="-".join)
@pytest.mark.parametrize("fault", FAULTS)
async def test_onboarding_under_a_fault(tmp_path: Path, fault: Fault, tiers: tuple[str, ...]) -> None:
    async with open_rig(tmp_path, tiers=tiers, onboard=SETTINGS, wrap_agent=FaultyTransfer) as rig:
        blocks = rig.sequence(TOKENS)
        await rig.store(blocks)
        assert await onboard_or_know(rig, blocks) == TOKENS
        leaks = leak_check(rig)
        for skip in (0, 5):
            for operation in ("copy",) if "host" in tiers else ("read",):
                faulty(rig).arm(fault, operation, skip=skip, count=2)  # type: ignore[arg-type]
            tokens = await onboard_or_know(rig, blocks)
            assert faulty(rig).met
            if tiers == ("host", "disk") and fault not in ("stuck", "peer_frozen", "agent_lost"):
                # What the host tier failed to give comes from the disk, where the transfer said that it
                # failed.
                assert tokens == TOKENS or fault in ("silently_short", "silently_torn", "bit_rot")
            faulty(rig).restore()
            await rig.adapter.tiers.settle()
            await leaks.settle(allow={"file descriptors": 8})
            await rig.store(blocks)
            assert await onboard_or_know(rig, blocks) == TOKENS


@pytest.mark.parametrize("fault", FAULTS)
async def test_offloading_under_a_fault(tmp_path: Path, fault: Fault) -> None:
    async with open_rig(tmp_path, onboard=SETTINGS, wrap_agent=FaultyTransfer, store_timeout_s=0.5) as rig:
        await rig.store(rig.sequence(TOKENS, name="warm"))
        leaks = leak_check(rig)
        for operation in ("copy", "write"):
            faulty(rig).arm(fault, operation, skip=1, count=2)  # type: ignore[arg-type]
        blocks = rig.sequence(TOKENS)
        offload = rig.adapter.offload(blocks, rig.source)
        result = await asyncio.wait_for(offload.wait(), 20)
        assert result.stored + result.dropped == 4
        faulty(rig).restore()
        # A block that was damaged silently is found when it is read, dropped, and stored anew.
        for _ in range(3):
            await onboard_or_know(rig, blocks)
            await rig.store(blocks)
        assert await onboard_or_know(rig, blocks) == TOKENS
        await rig.adapter.tiers.settle()
        await leaks.settle(allow={"file descriptors": 8, "bytes beside objects": 64 << 10})


async def test_lookups_and_onboards_cancelled_at_every_await(tmp_path: Path) -> None:
    async with open_rig(tmp_path, onboard=SETTINGS) as rig:
        blocks = rig.sequence(TOKENS)
        await rig.store(blocks)
        assert await onboard_or_know(rig, blocks) == TOKENS
        leaks = leak_check(rig)

        async def onboard() -> None:
            handle = rig.adapter.onboard(blocks, rig.destination)
            try:
                await handle.wait()
            finally:
                await handle.cancel()

        async def after(_: bool) -> None:
            await rig.adapter.tiers.settle()
            await leaks.settle(allow={"file descriptors": 8})

        await cancel_at_every_await(lambda: rig.adapter.lookup(blocks.hashes), after)
        await cancel_at_every_await(onboard, after)
        assert await onboard_or_know(rig, blocks) == TOKENS


async def test_offloads_and_resets_cancelled_at_every_await(tmp_path: Path) -> None:
    async with open_rig(tmp_path, onboard=SETTINGS) as rig:
        blocks = rig.sequence(TOKENS)
        await rig.store(blocks)
        assert await onboard_or_know(rig, blocks) == TOKENS
        await rig.adapter.reset()
        leaks = leak_check(rig)

        async def offload() -> None:
            ticket = rig.adapter.offload(blocks, rig.source)
            await ticket.gathered()
            await ticket.wait()

        async def after(_: bool) -> None:
            # Who waits may give up; the offload itself goes on, and a second one does nothing.
            await rig.store(blocks)
            for _ in range(2000):
                if await rig.adapter.lookup(blocks.hashes) == TOKENS:
                    break
                await asyncio.sleep(0.01)
            assert await onboard_or_know(rig, blocks) == TOKENS
            await rig.adapter.tiers.settle()
            await rig.adapter.reset()
            assert await rig.adapter.lookup(blocks.hashes) == 0
            await leaks.settle(allow={"file descriptors": 8, "bytes beside objects": 64 << 10})

        await cancel_at_every_await(offload, after)
        await rig.store(blocks)
        await cancel_at_every_await(rig.adapter.reset, after)


@pytest.mark.parametrize("step", range(0, 60, 10))
async def test_an_onboard_cancelled_after_any_turn_of_the_loop(tmp_path: Path, step: int) -> None:
    """The onboard's own task, cancelled while it waits for headers, memory, transfers and threads."""
    async with open_rig(tmp_path, tiers=("disk",), onboard=SETTINGS) as rig:
        blocks = rig.sequence(TOKENS)
        await rig.store(blocks)
        leaks = leak_check(rig)
        handle = rig.adapter.onboard(blocks, rig.destination)
        for _ in range(step):
            await asyncio.sleep(0)
        await handle.cancel()
        await leaks.settle(allow={"file descriptors": 8})
        assert await onboard_or_know(rig, blocks) == TOKENS
