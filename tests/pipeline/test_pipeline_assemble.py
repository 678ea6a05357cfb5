"""From a configuration file to a running adapter, with a real artifact folder."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from random_rd import write_random_rd_artifact

from dynamo_kvtc.codec.entropy import DEFLATE, RANS, STORE
from dynamo_kvtc.codec.geometry import KvGeometry, LayerRange
from dynamo_kvtc.codec.header import Profile
from dynamo_kvtc.config import Config, load_config
from dynamo_kvtc.errors import (
    ArtifactFormatError,
    ArtifactMismatchError,
    ConfigError,
    OnboardError,
    TierInUseError,
)
from dynamo_kvtc.pipeline.assemble import open_adapter, stores_at_once
from dynamo_kvtc.pipeline.blocks import SequenceBlocks
from dynamo_kvtc.pipeline.paged import PagedKvCache
from dynamo_kvtc.testing import ThrottledTier, TierWrapper
from dynamo_kvtc.tiers.base import Tier
from dynamo_kvtc.tiers.breaker_tier import BreakerTier

GEOMETRY = KvGeometry(num_layers=3, num_kv_heads=2, head_size=8, dtype="float32")

RAW = """
codec:
  profile: raw
tiers:
  - kind: host
    capacity: 1MiB
  - kind: disk
    path: tier
    capacity: 4MiB
policy:
  tier_block_tokens: 32
  recent_window: 0
  minimum_tokens: 0
transfer:
  staging: 1MiB
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "kvtc.yaml"
    path.write_text(text)
    return path


BUCKET = """
codec:
  profile: raw
tiers:
{first}  - kind: object
    bucket: kv-cache
    uploads: 6
    upload_queue: {queue}
"""
HOST = """  - kind: host
    capacity: 1MiB
"""


@pytest.mark.parametrize(
    ("first", "queue", "at_once"), [("", "64MiB", 6), (HOST, "0", 6), (HOST, "64MiB", 1)]
)
def test_a_batch_is_uploaded_side_by_side_where_offloads_wait_for_the_bucket(
    tmp_path: Path, first: str, queue: str, at_once: int
) -> None:
    config = load_config(write(tmp_path, BUCKET.format(first=first, queue=queue)))
    assert stores_at_once(config) == at_once


async def test_ten_lines_of_yaml_serve_an_engine(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, RAW))
    layers = [torch.randn(2, 8, 16, 2, 8) for _ in range(3)]
    cache = PagedKvCache.from_layers(layers, "2BNHD")
    expected = [layer.clone() for layer in layers]
    blocks = SequenceBlocks([bytes([i]) for i in range(8)], list(range(8)))
    async with await open_adapter(config, GEOMETRY, 16) as adapter:
        assert (await adapter.offload(blocks, cache).wait()).stored == 4
        assert set(adapter.status().tiers) == {"host0", "disk1"}
    for layer in layers:
        layer.zero_()
    async with await open_adapter(config, GEOMETRY, 16) as adapter:
        assert await adapter.lookup(blocks.hashes) == 128
        await adapter.onboard(blocks, cache).wait()
    assert all(layer.equal(before) for layer, before in zip(layers, expected, strict=True))


async def test_two_workers_share_a_folder_if_both_say_so(tmp_path: Path) -> None:
    alone = load_config(write(tmp_path, RAW.replace("tier\n", "alone\n", 1)))
    shared = load_config(write(tmp_path, RAW.replace("capacity: 4MiB", "capacity: 4MiB\n    shared: true")))
    layers = [torch.randn(2, 8, 16, 2, 8) for _ in range(3)]
    cache = PagedKvCache.from_layers(layers, "2BNHD")
    expected = [layer.clone() for layer in layers]
    blocks = SequenceBlocks([bytes([i]) for i in range(8)], list(range(8)))
    async with (
        await open_adapter(shared, GEOMETRY, 16) as one,
        await open_adapter(shared, GEOMETRY, 16) as two,
    ):
        assert (await one.offload(blocks, cache).wait()).stored == 4
        for layer in layers:
            layer.zero_()
        await asyncio.sleep(0.1)  # a lookup may be told what was there a twentieth of a second ago
        assert await two.lookup(blocks.hashes) == 128
        await two.onboard(blocks, cache).wait()
    assert all(layer.equal(before) for layer, before in zip(layers, expected, strict=True))
    async with await open_adapter(alone, GEOMETRY, 16):
        with pytest.raises(TierInUseError):
            await open_adapter(alone, GEOMETRY, 16)


async def test_configured_salts_separate_workers(tmp_path: Path) -> None:
    keys = []
    for salt in ("", "a"):
        config = load_config(write(tmp_path, RAW + f"security:\n  salt: '{salt}'\n"))
        async with await open_adapter(config, GEOMETRY, 16) as adapter:
            keys += [adapter.keys([b"x", b"y"])[0], adapter.keys([b"x", b"y"], salt=b"a")[0]]
    assert len(set(keys)) == 4


async def test_tiers_can_be_wrapped_for_measurements(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, RAW))

    def wrap(tier: Tier) -> Tier:
        return ThrottledTier(tier, 1e9)

    async with await open_adapter(config, GEOMETRY, 16, wrap_tier=wrap) as adapter:
        # A breaker is around whatever else is.
        assert all(
            isinstance(tier, BreakerTier) and isinstance(tier.inner, ThrottledTier)
            for tier in adapter.tiers.tiers
        )


async def test_what_contradicts_the_engine_is_refused_and_nothing_stays_open(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, RAW))
    with pytest.raises(ConfigError, match="multiple of the engine's block size"):
        await open_adapter(config, GEOMETRY, 24)
    missing = RAW.replace("codec:\n  profile: raw", "artifact: nowhere\ncodec:\n  profile: rd")
    with pytest.raises(ArtifactFormatError, match="nowhere"):
        await open_adapter(load_config(write(tmp_path, missing)), GEOMETRY, 16)

    def explode(tier: Tier) -> Tier:
        raise ConfigError("no")

    with pytest.raises(ConfigError, match="no"):
        await open_adapter(config, GEOMETRY, 16, wrap_tier=explode)
    async with await open_adapter(config, GEOMETRY, 16):
        pass  # the folder's lock was given back


@pytest.mark.parametrize(
    ("codec", "first_tier", "plan_id"),
    [
        ({}, {}, 1),
        ({"ratio": 10.0}, {}, 0),
        ({"max_kl": 0.01}, {}, 1),
        ({"max_kl": 0.002}, {}, 0),
        ({}, {"max_kl": 0.002}, 0),
    ],
)
async def test_the_configuration_chooses_among_the_plans_of_an_artifact(
    tmp_path: Path, codec: dict[str, float], first_tier: dict[str, float], plan_id: int
) -> None:
    config = _rd_config(tmp_path, codec, first_tier)
    cache = PagedKvCache.from_layers([torch.randn(2, 2, 16, 2, 8) for _ in range(3)], "2BNHD")
    blocks = SequenceBlocks([b"a", b"b"], [0, 1])
    async with await open_adapter(config, GEOMETRY, 16) as adapter:
        assert (await adapter.offload(blocks, cache).wait()).stored == 1
        (header,) = await adapter.headers(blocks.hashes)
        await adapter.onboard(blocks, cache).wait()
    assert (header.profile, header.plan_id) == (Profile.RD, plan_id)


@pytest.mark.parametrize(("entropy", "coder_id"), [(None, DEFLATE), ("deflate", DEFLATE), ("rans", RANS)])
async def test_the_configuration_chooses_the_entropy_coder(
    tmp_path: Path, entropy: str | None, coder_id: int
) -> None:
    config = _rd_config(tmp_path, {"entropy": entropy} if entropy else {})
    # Chunks must be long enough to shrink with either.
    policy = config.policy.model_copy(update={"tier_block_tokens": 512})
    config = config.model_copy(update={"policy": policy})
    cache = PagedKvCache.from_layers([torch.randn(2, 32, 16, 2, 8) for _ in range(3)], "2BNHD")
    blocks = SequenceBlocks([bytes([i]) for i in range(32)], list(range(32)))
    async with await open_adapter(config, GEOMETRY, 16) as adapter:
        assert (await adapter.offload(blocks, cache).wait()).stored == 1
        (header,) = await adapter.headers(blocks.hashes)
        await adapter.onboard(blocks, cache).wait()
    assert {chunk.coder_id for chunk in header.chunks} - {STORE} == {coder_id}


@pytest.mark.parametrize(
    ("codec", "says"),
    [
        ({"ratio": 16.0}, "it has 10, 20"),
        ({"max_kl": 1e-6}, "it has 0.001 at 10x, 0.004 at 20x"),
        ({"profile": "kvtc"}, "of profile rd, codec.profile is kvtc: set codec.profile to rd"),
    ],
)
async def test_what_the_artifact_does_not_have_is_refused_at_start(
    tmp_path: Path, codec: dict[str, Any], says: str
) -> None:
    with pytest.raises(ArtifactMismatchError, match=says):
        await open_adapter(_rd_config(tmp_path, codec), GEOMETRY, 16)


def _rd_config(folder: Path, codec: dict[str, Any], first_tier: dict[str, float] | None = None) -> Config:
    groups = [LayerRange(0, GEOMETRY.num_layers)]
    artifact = write_random_rd_artifact(folder / "artifact", geometry=GEOMETRY, groups=groups)
    return Config.model_validate(
        {
            "artifact": artifact.folder,
            "codec": codec,
            "tiers": [{"kind": "host", "capacity": "1MiB", "codec": first_tier}],
            "policy": {"tier_block_tokens": 32, "recent_window": 0, "minimum_tokens": 0},
            "transfer": {"staging": "2MiB"},
        }
    )


class StuckReads(TierWrapper):
    """Reads that never end, whatever deadline they are given."""

    gets = 0

    async def get(self, reads: Any, *, timeout_s: float) -> None:
        self.gets += 1
        await asyncio.sleep(3600)


async def test_a_tier_that_hangs_costs_three_requests_their_deadline_and_no_more(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, RAW + "pipeline: {onboard_timeout: 1100ms}\n"))
    cache = PagedKvCache.from_layers([torch.randn(2, 8, 16, 2, 8) for _ in range(3)], "2BNHD")
    blocks = SequenceBlocks([bytes([i]) for i in range(8)], list(range(8)))
    stuck: list[StuckReads] = []

    def wrap(tier: Tier) -> Tier:
        stuck.append(StuckReads(tier))
        return stuck[-1]

    async with await open_adapter(config, GEOMETRY, 16, wrap_tier=wrap) as adapter:
        await adapter.offload(blocks, cache).wait()
        for _ in range(3):
            assert await adapter.lookup(blocks.hashes) == 128
            with pytest.raises(OnboardError):
                await adapter.onboard(blocks, cache).wait()
        host, disk = stuck
        # The disk has the same blocks, and takes over.
        assert (host.gets, disk.gets) == (3, 0)
        assert adapter.status().tiers["host0"].paused == 1
        for _ in range(3):
            assert await adapter.lookup(blocks.hashes) == 128
            with pytest.raises(OnboardError):
                await adapter.onboard(blocks, cache).wait()
        for _ in range(20):
            assert await adapter.lookup(blocks.hashes) == 0
        assert (host.gets, disk.gets) == (3, 3)
