"""Priorities of requests: who is onboarded first, and whose blocks stay."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from rig import POLICY, open_rig

from dynamo_kvtc.pipeline.onboard import OnboardSettings
from dynamo_kvtc.policy.priorities import MOST_SPARED, times_spared
from dynamo_kvtc.testing.wrappers import TierWrapper
from dynamo_kvtc.tiers.base import ReadRequest, Tier


async def test_of_the_onboards_that_wait_the_most_urgent_begins_first(tmp_path: Path) -> None:
    gate, order = asyncio.Event(), list[bytes]()

    class Slow(TierWrapper):
        async def get(self, reads: Sequence[ReadRequest], *, timeout_s: float) -> None:
            if not order or order[-1] != reads[0].key:
                order.append(reads[0].key)
            await gate.wait()
            await super().get(reads, timeout_s=timeout_s)

    def wrap(tier: Tier, name: str) -> Tier:
        return Slow(tier)

    async with open_rig(tmp_path, tiers=("host",), wrap=wrap, onboard=OnboardSettings(at_once=1)) as rig:
        names = {"first": 0, "usual": 0, "later": 3, "urgent": -1}
        stored = {}
        for index, (name, priority) in enumerate(names.items()):
            blocks = replace(rig.sequence(32, name=name, first_id=4 * index), priority=priority)
            await rig.store(blocks)
            stored[rig.adapter.keys(blocks.hashes)[0]] = name, blocks
        handles = []
        for _, blocks in stored.values():
            handles.append(rig.adapter.onboard(blocks, rig.destination))
            await asyncio.sleep(0.01)
        gate.set()
        await asyncio.gather(*(handle.wait() for handle in handles))
        assert [stored[key][0] for key in order] == ["first", "urgent", "usual", "later"]
        for _, blocks in stored.values():
            rig.assert_in_place(blocks)


async def test_an_onboard_that_is_cancelled_while_it_waits_holds_nobody_up(tmp_path: Path) -> None:
    async with open_rig(tmp_path, tiers=("host",), onboard=OnboardSettings(at_once=1)) as rig:
        blocks = rig.sequence(64)
        await rig.store(blocks)
        handles = [rig.adapter.onboard(blocks, rig.destination) for _ in range(3)]
        await handles[1].cancel()
        await handles[0].wait()
        await handles[2].wait()
        rig.assert_in_place(blocks)


async def test_blocks_of_an_urgent_request_outlast_others(tmp_path: Path) -> None:
    """The host tier has room for some sequences; many come after two, of which one is of high priority."""
    async with open_rig(tmp_path, profile="raw", tiers=("host",), host_bytes=96 << 10) as rig:
        urgent = replace(rig.sequence(64, name="urgent"), priority=-2)
        usual = rig.sequence(64, name="usual")
        await rig.store(urgent)
        await rig.store(usual)
        lost: dict[str, int] = {}
        for index in range(40):
            await rig.store(rig.sequence(64, name=f"other {index}"))
            for name, blocks in (("urgent", urgent), ("usual", usual)):
                # Without a lookup, which would make them young again.
                key = rig.adapter.keys(blocks.hashes)[0]
                if rig.adapter.tiers.size_of(key) is None:
                    lost.setdefault(name, index)
        assert lost["usual"] < lost["urgent"] < 39
        assert rig.adapter.policy == POLICY


@given(st.integers(), st.integers())
def test_a_higher_priority_is_spared_at_least_as_often(a: int, b: int) -> None:
    urgent, other = sorted((a, b))
    assert MOST_SPARED >= times_spared(urgent) >= times_spared(other) >= 0
    assert times_spared(max(0, a)) == 0
