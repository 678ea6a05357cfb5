"""Pinned prefixes stay, within their share."""

from __future__ import annotations

from pathlib import Path

from rig import open_rig


async def test_a_pinned_prefix_survives_a_reset_until_it_is_let_go(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        kept, other = rig.sequence(64, name="a"), rig.sequence(64, name="b")
        await rig.store(kept)
        await rig.store(other)
        assert rig.adapter.pin(kept.hashes) == 64
        assert rig.adapter.pin(kept.hashes) == 64
        await rig.adapter.reset()
        assert await rig.adapter.lookup(kept.hashes) == 64
        assert await rig.adapter.lookup(other.hashes) == 0
        assert rig.adapter.unpin(kept.hashes) == 64
        await rig.adapter.reset()
        assert await rig.adapter.lookup(kept.hashes) == 64  # pinned twice
        assert rig.adapter.unpin(kept.hashes) == 64
        assert rig.adapter.unpin(kept.hashes) == 0
        await rig.adapter.reset()
        assert await rig.adapter.lookup(kept.hashes) == 0


async def test_only_what_is_stored_is_pinned_and_other_salts_are_other_prefixes(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        blocks = rig.sequence(32)
        await rig.store(blocks)
        assert rig.adapter.pin(rig.sequence(64).hashes) == 32
        assert rig.adapter.pin(blocks.hashes, salt=b"other") == 0


async def test_pins_take_a_share_at_most(tmp_path: Path) -> None:
    async with open_rig(tmp_path, tiers=("host",), host_bytes=64 << 10, profile="raw") as rig:
        blocks = rig.sequence(96)
        stored = await rig.adapter.offload(blocks, rig.source).wait()
        assert stored.stored == 3  # about 17 KiB each
        assert rig.adapter.pin(blocks.hashes) == 32
