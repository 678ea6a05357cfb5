"""The quality guard inside the offload: it samples, goes gentler, and stops storing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rig import BLOCK_SIZE, GEOMETRY, PARAMETERS, open_rig
from synthetic import make_block, make_parameters

from dynamo_kvtc.codec.base import TierBlock
from dynamo_kvtc.codec.fidelity import relative_error
from dynamo_kvtc.codec.kvtc import KvtcCodec
from dynamo_kvtc.pipeline.guarded import GuardedEncoder, Level
from dynamo_kvtc.policy.guard import GuardSettings, QualityGuard

TWO_PLANS = make_parameters(GEOMETRY, groups=2, ratios=(8.0, 2.0))


def encoder(expected: float, samples: int = 1) -> GuardedEncoder:
    levels = [
        Level(f"kvtc ratio={ratio:g}", KvtcCodec(TWO_PLANS, ratio=ratio, threads=1)) for ratio in (8.0, 2.0)
    ]
    guard = QualityGuard(GuardSettings(share=1.0, tolerance=2.0, samples=samples), len(levels))
    return GuardedEncoder(guard, levels, expected)


def test_the_error_of_an_exact_copy_is_zero_and_of_the_mean_is_one() -> None:
    block = make_block(PARAMETERS, 32)
    assert relative_error(PARAMETERS, block, block) == 0
    keys, values = torch.empty_like(block.keys), torch.empty_like(block.values)
    rope = PARAMETERS.rope
    rotation = rope.cos_sin(torch.arange(32))
    for group in PARAMETERS.groups:
        span = slice(group.layers.first, group.layers.stop)
        shape = keys[:, span].shape
        keys[:, span] = rope.rotate(group.keys.mean.view(shape[1:]).expand(shape), *rotation)
        values[:, span] = group.values.mean.view(shape[1:])
    error = relative_error(PARAMETERS, block, TierBlock(keys, values, 0))
    assert error == pytest.approx(1, rel=0.02)


def test_a_gentler_plan_has_a_smaller_error() -> None:
    block = make_block(TWO_PLANS, 32)
    errors = []
    for ratio in (8.0, 2.0):
        codec = KvtcCodec(TWO_PLANS, ratio=ratio, threads=1)
        errors.append(relative_error(TWO_PLANS, block, codec.decode(codec.encode([block])[0])))
    assert errors[1] < errors[0]


def test_sinks_are_left_out() -> None:
    block = make_block(PARAMETERS, 8)
    only_sinks = TierBlock(block.keys, block.values, 0, 8)
    assert relative_error(PARAMETERS, only_sinks, TierBlock(-block.keys, block.values, 0, 8)) == 0


async def test_what_is_as_good_as_stated_is_stored_as_configured(tmp_path: Path) -> None:
    guarded = encoder(expected=1.0)
    async with open_rig(tmp_path, codec=guarded.current.codec, guarded=guarded) as rig:
        blocks = rig.sequence(64)
        await rig.store(blocks)
        assert rig.adapter.status().guard["checks"] == {"good": 2, "drift": 0}
        assert guarded.guard.state == "ok"
        assert await rig.adapter.lookup(blocks.hashes) == 64


async def test_drift_takes_a_gentler_plan_and_then_stops_storing(tmp_path: Path) -> None:
    guarded = encoder(expected=1e-9)
    async with open_rig(tmp_path, codec=guarded.current.codec, guarded=guarded) as rig:
        first, second = (rig.sequence(32, name=name) for name in "ab")
        await rig.store(first)
        assert rig.adapter.status().guard["state"] == "raised"
        await rig.store(second)
        assert rig.adapter.status().guard["state"] == "stopped"
        # Both plans' streams are found under the same keys and decode.
        for blocks in (first, second):
            assert await rig.adapter.lookup(blocks.hashes) == 32
            await rig.adapter.onboard(blocks, rig.destination).wait()
            keys, values = rig.destination.gather(blocks.block_ids)
            assert torch.isfinite(keys).all() and torch.isfinite(values).all()
        plans = [(await rig.adapter.headers(one.hashes))[0].plan_id for one in (first, second)]
        assert [TWO_PLANS.ratios[plan] for plan in plans] == [8.0, 2.0]
        result = await rig.adapter.offload(rig.sequence(32, name="c"), rig.source).wait()
        assert (result.stored, result.dropped) == (0, 0)
        assert rig.adapter.status().counters.decisions["offload"]["skip"] == 1
        assert BLOCK_SIZE * len(first.hashes) == 32
