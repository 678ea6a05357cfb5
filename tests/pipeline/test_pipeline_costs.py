"""Measured costs inside a running adapter."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from rig import open_rig


async def test_speeds_are_measured_while_serving(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        blocks = rig.sequence(64)
        await rig.store(blocks)
        await rig.adapter.onboard(blocks, rig.destination).wait()
        speeds = rig.adapter.status().speeds
        assert speeds["decode"] > 0 and speeds["read"]["host"] > 0 and "disk" not in speeds["read"]
        assert speeds["encode"]["default"] > 0
        header = (await rig.adapter.headers(blocks.hashes))[0]
        assert 0 < speeds["token_bytes"]["default"] <= 2 * header.stream_size / header.num_tokens
        assert rig.adapter.status().counters.recompute_avoided_seconds == 0  # the prefill speed is not known


async def test_a_prefix_that_is_dearer_than_its_prefill_is_not_promised(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_rig(tmp_path) as rig:
        blocks = rig.sequence(64)
        await rig.store(blocks)
        await rig.adapter.onboard(blocks, rig.destination).wait()
        rig.adapter.prefilled(tokens=10**9, seconds=1.0)  # an engine that nothing can beat
        with caplog.at_level(logging.DEBUG, logger="dynamo_kvtc"):
            assert await rig.adapter.lookup(blocks.hashes) == 0
        snapshot = rig.adapter.status().counters
        assert snapshot.decisions["onboard"]["recompute"] == 1
        assert snapshot.found_blocks == 2  # found, and not promised
        (line,) = [record for record in caplog.records if record.getMessage() == "looked up"]
        assert line.kvtc["action"] == "recompute" and line.kvtc["promised"] == 0  # type: ignore[attr-defined]
        result = await rig.adapter.offload(rig.sequence(64, name="b"), rig.source).wait()
        assert result.stored == 0
        assert rig.adapter.status().counters.decisions["offload"]["skip"] == 2


async def test_what_a_slow_engine_saves_is_counted(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        rig.adapter.prefilled(tokens=1, seconds=1.0)
        blocks = rig.sequence(64)
        await rig.store(blocks)
        assert await rig.adapter.lookup(blocks.hashes) == 64
        await rig.adapter.onboard(blocks, rig.destination).wait()
        assert rig.adapter.status().counters.recompute_avoided_seconds == pytest.approx(64)


async def test_what_the_engine_has_already_is_not_decided_about(tmp_path: Path) -> None:
    """The rest of a prefix has to pay for itself: the overhead of an onboard with it."""
    async with open_rig(tmp_path) as rig:
        blocks = rig.sequence(128)
        await rig.store(blocks)
        speeds = rig.adapter.costs.speeds
        speeds.read("host", 10**12, 1.0)
        speeds.onboarded(10**9, wall_s=2.0, transfer_s=0.5, decode_s=1.0)  # and a second of overhead
        rig.adapter.prefilled(tokens=64, seconds=1.0)
        assert await rig.adapter.lookup(blocks.hashes) == 128
        assert await rig.adapter.lookup(blocks.hashes, have_tokens=32) == 128
        assert await rig.adapter.lookup(blocks.hashes, have_tokens=96) == 0
        assert rig.adapter.status().counters.decisions["onboard"]["recompute"] == 1
        # Nothing is left to decide.
        assert await rig.adapter.lookup(blocks.hashes, have_tokens=128) == 0
        assert await rig.adapter.lookup(blocks.hashes[:4], have_tokens=96) == 0
        assert rig.adapter.status().counters.decisions["onboard"]["recompute"] == 1
