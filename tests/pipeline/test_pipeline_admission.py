"""Gates in front of lower tiers, in a running stack."""

from __future__ import annotations

from pathlib import Path

from rig import open_rig

from dynamo_kvtc.policy.admission import Admission


async def test_a_block_reaches_the_disk_once_it_was_asked_for_often_enough(tmp_path: Path) -> None:
    async with open_rig(tmp_path, gates={"disk": Admission(admit_after=2)}) as rig:
        blocks = rig.sequence(64)
        assert await rig.adapter.lookup(blocks.hashes) == 0
        await rig.store(blocks)
        tiers = rig.adapter.status().tiers
        assert (tiers["host"].objects, tiers["disk"].objects) == (2, 0)
        assert tiers["disk"].not_admitted == {"frequency": 2, "budget": 0}
        assert rig.adapter.tiers.failed_puts == 0
        assert await rig.adapter.lookup(blocks.hashes) == 64
        await rig.adapter.onboard(blocks, rig.destination).wait()
        rig.assert_in_place(blocks)
        await rig.adapter.tiers.settle()
        assert rig.adapter.status().tiers["disk"].objects == 2
        assert rig.adapter.tiers.promotions == 0


async def test_a_gate_never_closes_the_first_tier(tmp_path: Path) -> None:
    async with open_rig(tmp_path, tiers=("disk",), gates={"disk": Admission(admit_after=5)}) as rig:
        await rig.store(rig.sequence(64))
        assert rig.adapter.status().tiers["disk"].objects == 2
