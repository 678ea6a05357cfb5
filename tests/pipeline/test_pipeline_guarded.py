"""The quality guard inside the offload: it samples, goes gentler, then stores raw."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rig import GEOMETRY, PARAMETERS, open_rig
from synthetic import make_block, make_parameters

from dynamo_kvtc.codec.base import TierBlock
from dynamo_kvtc.codec.fidelity import relative_error
from dynamo_kvtc.codec.header import Profile
from dynamo_kvtc.codec.kvtc import KvtcCodec
from dynamo_kvtc.codec.mixed import MixedCodec
from dynamo_kvtc.codec.raw import RawCodec
from dynamo_kvtc.pipeline.encoders import Encoder, Encoders
from dynamo_kvtc.policy.guard import GuardSettings

TWO_PLANS = make_parameters(GEOMETRY, groups=2, ratios=(8.0, 2.0))


CODECS = [KvtcCodec(TWO_PLANS, ratio=ratio, threads=1) for ratio in (8.0, 2.0)]
RAW_CODEC = RawCodec(GEOMETRY, TWO_PLANS.artifact_id, layer_groups=CODECS[0].layer_groups)
MIXED = MixedCodec(CODECS[0], RAW_CODEC)


def make_encoders(expected: float, *, raw: bool = True) -> Encoders:
    plans = [
        Encoder(f"kvtc ratio={ratio:g}", codec, ratio, expected)
        for ratio, codec in zip((8.0, 2.0), CODECS, strict=True)
    ]
    guard = GuardSettings(share=1.0, tolerance=2.0, samples=1)
    last = Encoder("raw", RAW_CODEC) if raw else None
    return Encoders(plans, guard=guard, raw=last, no_raw="policy.raw is never")


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
    encoders = make_encoders(expected=1.0)
    async with open_rig(tmp_path, codec=MIXED, encoders=encoders) as rig:
        blocks = rig.sequence(64)
        await rig.store(blocks)
        assert rig.adapter.status().guard["checks"] == {"good": 2, "drift": 0}
        assert encoders.guard.state == "ok"
        assert await rig.adapter.lookup(blocks.hashes) == 64


async def test_drift_takes_a_gentler_plan_and_then_raw_and_all_are_read_after_a_restart(
    tmp_path: Path,
) -> None:
    names = "abc"
    async with open_rig(tmp_path, codec=MIXED, encoders=make_encoders(1e-9)) as rig:
        states = []
        for name in names:
            await rig.store(rig.sequence(32, name=name))
            states.append(rig.adapter.status().guard["state"])
        assert states == ["raised", "raw", "raw"]
        counters = rig.adapter.status().counters
        assert counters.encoded_blocks == {"kvtc ratio=8": 1, "kvtc ratio=2": 1, "raw": 1}
        decisions = counters.decisions["offload"]
        assert (decisions["compress"], decisions["gentler"], decisions["raw"]) == (1, 1, 1)
        # The exact bytes are not checked: there is nothing that could differ.
        assert rig.adapter.status().guard["checks"] == {"good": 0, "drift": 2}
        assert rig.adapter.status().guard["encodes_with"] == "raw"
    # Only the disk tier is left, and another process, which may not store raw, reads all three.
    encoders = make_encoders(1.0, raw=False)
    async with open_rig(tmp_path, codec=MIXED, encoders=encoders, tiers=("disk",)) as rig:
        headers = []
        for name in names:
            blocks = rig.sequence(32, name=name)
            assert await rig.adapter.lookup(blocks.hashes) == 32
            await rig.adapter.onboard(blocks, rig.destination).wait()
            headers += await rig.adapter.headers(blocks.hashes)
            found = rig.destination.gather(blocks.block_ids)
            assert all(torch.isfinite(side).all() for side in found)
        exact = rig.source.gather(blocks.block_ids)
        assert all(torch.equal(one, other) for one, other in zip(found, exact, strict=True))
        assert [TWO_PLANS.ratios[one.plan_id] for one in headers[:2]] == [8.0, 2.0]
        assert headers[2].profile is Profile.RAW


async def test_one_sequence_of_all_kinds_of_streams_is_onboarded_at_once(tmp_path: Path) -> None:
    async with open_rig(tmp_path, codec=MIXED, encoders=make_encoders(1e-9)) as rig:
        for stop in (32, 64, 96):
            await rig.store(rig.sequence(stop))
        blocks = rig.sequence(96)
        headers = await rig.adapter.headers(blocks.hashes)
        assert [one.profile for one in headers] == [Profile.KVTC, Profile.KVTC, Profile.RAW]
        await rig.adapter.onboard(blocks, rig.destination).wait()
        keys, values = rig.destination.gather(blocks.block_ids)
        exact_keys, exact_values = rig.source.gather(blocks.block_ids)
        assert torch.isfinite(keys).all() and torch.isfinite(values).all()
        assert torch.equal(keys[64:], exact_keys[64:]) and torch.equal(values[64:], exact_values[64:])
        # What mixed streams take to decode says nothing about any one encoder.
        assert rig.adapter.status().speeds["decode_by"] == {}


async def test_without_raw_the_last_step_is_to_stop_storing_and_the_status_says_why(tmp_path: Path) -> None:
    async with open_rig(tmp_path, codec=MIXED, encoders=make_encoders(1e-9, raw=False)) as rig:
        for name in "ab":
            await rig.store(rig.sequence(32, name=name))
        guard = rig.adapter.status().guard
        assert guard["state"] == "stopped" and guard["last_resort"] == "stop storing (policy.raw is never)"
        result = await rig.adapter.offload(rig.sequence(32, name="c"), rig.source).wait()
        assert (result.stored, result.dropped) == (0, 0)
        assert rig.adapter.status().counters.decisions["offload"]["skip"] == 1


def test_coarser_plans_are_given_up_first() -> None:
    plans = [Encoder(str(ratio), CODECS[0], ratio, 0.1) for ratio in (80.0, 40.0, 20.0, 10.0)]
    encoders = Encoders(
        plans, 2, raw=Encoder("raw", RAW_CODEC), raw_by_cost=True, guard=GuardSettings(1.0, 2.0, samples=1)
    )
    seen = []
    for _ in range(4):
        seen.append([(one.name, action) for one, action in encoders.allowed()])
        encoders.guard.checked(100.0)
    assert seen == [
        [("20.0", "compress"), ("40.0", "coarser"), ("80.0", "coarser"), ("raw", "raw")],
        [("20.0", "compress"), ("raw", "raw")],
        [("10.0", "gentler"), ("raw", "raw")],
        [("raw", "raw")],
    ]
    # What was chosen before the guard acted is encoded as the guard wants it.
    assert encoders.resolve(plans[0]).name == "raw"
