"""Events of the tiers: what comes and goes, by sequence hash."""

from __future__ import annotations

from pathlib import Path

from rig import open_rig

from dynamo_kvtc.pipeline.events import EventLog, TierEvent
from dynamo_kvtc.tiers.stack import TierStack


def _told(events: list[TierEvent]) -> list[tuple[str, str, bool]]:
    return [(event.sequence_hash.decode(), event.tier, event.stored) for event in events]


async def test_what_is_stored_is_told_once_per_tier_and_what_is_dropped_too(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        log = rig.adapter.watch()
        assert rig.adapter.watch() is log
        blocks = rig.sequence(64)
        await rig.store(blocks)
        assert sorted(_told(log.take())) == [
            ("a:3", "disk", True),
            ("a:3", "host", True),
            ("a:7", "disk", True),
            ("a:7", "host", True),
        ]
        await rig.adapter.lookup(blocks.hashes)
        assert log.take() == []
        [first, _] = rig.adapter.keys(blocks.hashes)
        await rig.adapter.tiers.tiers[0].evict([first])
        assert _told(log.take()) == [("a:3", "host", False)]
        await rig.adapter.reset()
        assert sorted(_told(log.take())) == [
            ("a:3", "disk", False),
            ("a:7", "disk", False),
            ("a:7", "host", False),
        ]


async def test_promotion_and_damage_are_told(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        log = rig.adapter.watch()
        blocks = rig.sequence(32)
        await rig.store(blocks)
        keys = rig.adapter.keys(blocks.hashes)
        host, disk = rig.adapter.tiers.tiers
        await host.evict(keys)
        log.take()
        await rig.adapter.onboard(blocks, rig.destination).wait()
        await rig.adapter.tiers.settle()
        assert _told(log.take()) == [("a:3", "host", True)]
        await disk.evict(keys)
        assert _told(log.take()) == [("a:3", "disk", False)]


async def test_what_an_earlier_process_stored_is_told_when_it_is_found(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        await rig.store(rig.sequence(64))
    async with open_rig(tmp_path) as rig:
        log = rig.adapter.watch()
        assert log.take() == []
        assert await rig.adapter.lookup(rig.sequence(96).hashes) == 64
        assert _told(log.take()) == [("a:3", "disk", True), ("a:7", "disk", True)]


async def test_salted_sequences_are_told_by_their_own_hashes(tmp_path: Path) -> None:
    async with open_rig(tmp_path, tiers=("host",)) as rig:
        log = rig.adapter.watch()
        await rig.store(rig.sequence(32, name="x", salt=b"one"))
        await rig.store(rig.sequence(32, name="y", salt=b"two"))
        assert _told(log.take()) == [("x:3", "host", True), ("y:3", "host", True)]


async def test_memory_is_bounded_and_forgotten_promises_are_withdrawn(tmp_path: Path) -> None:
    async with open_rig(tmp_path, tiers=("host",)) as rig:
        rig.adapter.events = EventLog(rig.adapter.tiers, most_names=2, most_events=3)
        log = rig.adapter.events
        for name in ("a", "b", "c"):
            await rig.store(rig.sequence(32, name=name))
        # Storing c forgot a: stored a, stored b, lost a, stored c, of which three are kept.
        assert _told(log.take()) == [("b:3", "host", True), ("a:3", "host", False), ("c:3", "host", True)]
        assert log.lost == 1
        await rig.adapter.reset()
        assert _told(log.take()) == [("b:3", "host", False), ("c:3", "host", False)]


async def test_tiers_that_cannot_tell_tell_nothing(tmp_path: Path) -> None:
    from dynamo_kvtc.testing import TierWrapper
    from dynamo_kvtc.tiers.base import Tier

    class Silent(TierWrapper):
        watch = Tier.watch

    async with open_rig(tmp_path, tiers=("host",), wrap=lambda tier, _: Silent(tier)) as rig:
        assert isinstance(rig.adapter.tiers, TierStack)
        log = rig.adapter.watch()
        blocks = rig.sequence(32)
        await rig.store(blocks)
        assert log.take() == []
        await rig.adapter.lookup(blocks.hashes)
        assert _told(log.take()) == [("a:3", "host", True)]
