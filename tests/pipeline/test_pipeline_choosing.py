"""What sequences are stored with in a running adapter: the operator's bounds, room, and measured costs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from random_rd import write_random_rd_artifact

from dynamo_kvtc.codec.geometry import KvGeometry, LayerRange
from dynamo_kvtc.codec.header import Profile
from dynamo_kvtc.config import Config
from dynamo_kvtc.pipeline.adapter import TierAdapter
from dynamo_kvtc.pipeline.assemble import open_adapter
from dynamo_kvtc.pipeline.blocks import SequenceBlocks
from dynamo_kvtc.pipeline.paged import PagedKvCache

GEOMETRY = KvGeometry(num_layers=3, num_kv_heads=2, head_size=8, dtype="float32")
RAW_BYTES = 32 * GEOMETRY.token_bytes


def make_config(folder: Path, *, host: int = 64 * RAW_BYTES, **changed: dict[str, Any]) -> Config:
    groups = [LayerRange(0, GEOMETRY.num_layers)]
    artifact = write_random_rd_artifact(
        folder / "artifact", geometry=GEOMETRY, groups=groups, ratios={0: 5.0, 1: 10.0, 2: 20.0, 3: 40.0}
    )
    plain = {"tier_block_tokens": 32, "recent_window": 0, "minimum_tokens": 0, "guard": {"share": 0.0}}
    return Config.model_validate(
        {
            "artifact": artifact.folder,
            "codec": {"ratio": 10.0, **changed.get("codec", {})},
            "tiers": [
                {"kind": "host", "capacity": host},
                {"kind": "disk", "path": folder / "disk", "capacity": "64MiB"},
            ],
            "policy": {**plain, **changed.get("policy", {})},
            "transfer": {"staging": "2MiB", **changed.get("transfer", {})},
        }
    )


def make_cache() -> PagedKvCache:
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(2, 16, 16, 2, 8, generator=generator) for _ in range(GEOMETRY.num_layers)]
    return PagedKvCache.from_layers(layers, "2BNHD")


def sequence(name: bytes, blocks: int = 2) -> SequenceBlocks:
    return SequenceBlocks([name + bytes([index]) for index in range(blocks)], list(range(blocks)))


def tell(adapter: TierAdapter, *, read: float, decode: float) -> None:
    """Speeds as if they had been measured; prefill is so slow that everything is worth storing."""
    speeds = adapter.costs.speeds
    adapter.prefilled(1, 100.0)
    for tier in adapter.tiers.tiers:
        for _ in range(64):
            speeds.read(tier.name, int(read), 1.0)
    speeds.onboarded(int(decode), wall_s=1.0, transfer_s=0.0, decode_s=1.0)


async def test_by_default_there_is_one_candidate(tmp_path: Path) -> None:
    async with await open_adapter(make_config(tmp_path), GEOMETRY, 16) as adapter:
        tell(adapter, read=1e3, decode=1e6)
        assert (await adapter.offload(sequence(b"a"), make_cache()).wait()).stored == 1
        status = adapter.status()
        assert [one["encoder"] for one in status.policy["candidates"]] == ["rd ratio=10"]
        assert status.counters.decisions["offload"]["compress"] == 1


async def test_a_coarser_plan_is_taken_where_reading_takes_the_time_and_only_as_far_as_allowed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(tmp_path, codec={"max_ratio": 20.0})
    async with await open_adapter(config, GEOMETRY, 16) as adapter:
        tell(adapter, read=1e3, decode=1e6)
        with caplog.at_level(logging.DEBUG, logger="dynamo_kvtc"):
            assert (await adapter.offload(sequence(b"a"), make_cache()).wait()).stored == 1
        status = adapter.status()
        assert [one["encoder"] for one in status.policy["candidates"]] == ["rd ratio=10", "rd ratio=20"]
        assert status.counters.decisions["offload"]["coarser"] == 1
        assert status.counters.encoded_blocks == {"rd ratio=20": 1}
        (header,) = await adapter.headers(sequence(b"a").hashes)
        assert header.plan_id == 2
        (line,) = [one for one in caplog.records if one.getMessage() == "offload"]
        assert line.kvtc["encoder"] == "rd ratio=20"  # type: ignore[attr-defined]


async def test_raw_is_stored_where_it_is_faster_and_comes_back_bit_for_bit(tmp_path: Path) -> None:
    cache, blocks = make_cache(), sequence(b"a", 4)
    exact = [side.clone() for side in cache.gather(blocks.block_ids)]
    async with await open_adapter(make_config(tmp_path, policy={"raw": "by_cost"}), GEOMETRY, 16) as adapter:
        tell(adapter, read=1e12, decode=1e3)
        assert (await adapter.offload(blocks, cache).wait()).stored == 2
        assert adapter.status().counters.decisions["offload"]["raw"] == 2
        headers = await adapter.headers(blocks.hashes)
        assert {one.profile for one in headers} == {Profile.RAW}
    # Another process with the default policy reads what lies on the disk.
    async with await open_adapter(make_config(tmp_path), GEOMETRY, 16) as adapter:
        for side in (*cache.keys, *cache.values):
            side.zero_()
        assert await adapter.lookup(blocks.hashes) == 64
        await adapter.onboard(blocks, cache).wait()
        for found, wanted in zip(cache.gather(blocks.block_ids), exact, strict=True):
            assert torch.equal(found, wanted)
        assert adapter.status().speeds["decode_by"]["raw"] > 0


async def test_raw_by_cost_leaves_tiers_half_empty_and_fills_from_the_top(tmp_path: Path) -> None:
    config = make_config(tmp_path, host=5 * RAW_BYTES, policy={"raw": "by_cost"})
    async with await open_adapter(config, GEOMETRY, 16) as adapter:
        tell(adapter, read=1e12, decode=1e3)
        for name in (b"a", b"b", b"c", b"d"):
            await adapter.offload(sequence(name), make_cache()).wait()
        assert adapter.status().counters.encoded_blocks == {"raw": 2, "rd ratio=10": 2}


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"policy": {"raw": "never"}}, "policy.raw is never"),
        ({"policy": {"tier_block_tokens": 8192}}, "transfer.staging has"),
    ],
)
async def test_where_raw_is_not_to_be_had_the_status_says_why(
    tmp_path: Path, changed: dict[str, Any], why: str
) -> None:
    async with await open_adapter(make_config(tmp_path, **changed), GEOMETRY, 16) as adapter:
        assert why in adapter.status().guard["last_resort"]
    async with await open_adapter(make_config(tmp_path), GEOMETRY, 16) as adapter:
        assert adapter.status().guard["last_resort"] == "raw"


@pytest.mark.parametrize("codec", [{"max_ratio": 5.0}, {"ratio": None, "max_kl": 0.01, "max_ratio": 40.0}])
def test_bounds_that_contradict_the_plan_are_refused(tmp_path: Path, codec: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="max_ratio"):
        make_config(tmp_path, codec=codec)
