"""The rd profile's codec: round trips, sizes, choice of plans, and refusal of foreign and damaged streams."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import make_block, make_parameters, make_rd_parameters

from dynamo_kvtc.codec.bitstream import SectionKind
from dynamo_kvtc.codec.entropy import DeflateCoder
from dynamo_kvtc.codec.geometry import KvGeometry
from dynamo_kvtc.codec.kvtc import KvtcCodec
from dynamo_kvtc.codec.open import open_codec
from dynamo_kvtc.codec.parameters import RdParameters
from dynamo_kvtc.codec.rd import RdCodec
from dynamo_kvtc.codec.rd_plan import RdPlan
from dynamo_kvtc.codec.transform import SideTransform
from dynamo_kvtc.errors import (
    ArtifactMismatchError,
    BitstreamError,
    ChunkTableError,
    EncodeRangeError,
    StreamMismatchError,
)

GEOMETRY = KvGeometry(num_layers=6, num_kv_heads=2, head_size=16)


@pytest.fixture(scope="module")
def parameters() -> RdParameters:
    return make_rd_parameters(GEOMETRY, groups=2, steps=(0.2, 1.0))


@pytest.fixture(scope="module")
def codec(parameters) -> RdCodec:
    return RdCodec(parameters, ratio=2.0)


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "geometry",
    [
        KvGeometry(1, 1, 2),
        KvGeometry(2, 1, 64, "float16"),
        KvGeometry(3, 5, 6, "float32"),
        KvGeometry(4, 8, 24),
    ],
    ids=str,
)
@pytest.mark.parametrize(("tokens", "sinks"), [(1, 0), (1, 1), (33, 4)])
def test_round_trip(geometry, tokens, sinks, compute_dtype):
    parameters = make_rd_parameters(geometry, groups=min(2, geometry.num_layers), steps=(0.2,))
    codec = RdCodec(parameters, ratio=2.0, compute_dtype=compute_dtype, threads=1)
    block = make_block(parameters, tokens, first_position=100, sink_tokens=sinks, noise=0.0)
    (stream,) = codec.encode([block])
    decoded = codec.decode(stream)
    assert (decoded.first_position, decoded.sink_tokens) == (100, sinks)
    for name in ("keys", "values"):
        wanted, found = getattr(block, name), getattr(decoded, name)
        assert found.shape == wanted.shape and found.dtype is geometry.torch_dtype
        # One in ten components is not stored.
        assert relative_error(found, wanted) < 0.5


def test_a_smaller_step_gives_a_smaller_error_at_a_larger_size(parameters):
    block = make_block(parameters, 64)
    errors, sizes = [], []
    for ratio in (2.0, 10.0):
        codec = RdCodec(parameters, ratio=ratio)
        (stream,) = codec.encode([block])
        errors.append(relative_error(codec.decode(stream).keys, block.keys))
        sizes.append(len(stream))
    assert errors[0] < errors[1] < 0.3
    assert sizes[0] > 1.5 * sizes[1]


@settings(deadline=None, max_examples=15)
@given(tokens=st.integers(1, 80), sinks=st.integers(0, 5), sink_bits=st.sampled_from([8, 16]))
def test_sizes_are_known_before_encoding(parameters, tokens, sinks, sink_bits):
    sinks = min(sinks, tokens)
    for ratio, coder in ((2.0, None), (10.0, DeflateCoder())):
        codec = RdCodec(parameters, ratio=ratio, sink_bits=sink_bits, threads=1, coder=coder)
        (stream,) = codec.encode([make_block(parameters, tokens, sink_tokens=sinks)])
        header = codec.read_header(stream)
        assert codec.header_bytes(tokens, sinks) == header.header_size
        assert header.header_size <= codec.max_header_bytes(tokens, sinks)
        assert len(stream) <= codec.max_stream_bytes(tokens, sinks)


def test_a_stream_does_not_depend_on_its_batch_or_on_threads(parameters):
    blocks = [
        make_block(parameters, 32, first_position=32 * i, sink_tokens=4 * (i == 0), seed=i) for i in range(4)
    ]
    together = RdCodec(parameters, ratio=2.0, threads=3).encode(blocks)
    alone = RdCodec(parameters, ratio=2.0, threads=1)
    assert together == [alone.encode([block])[0] for block in blocks]


def test_a_layer_decodes_alone_and_joined_with_the_blocks_behind_it(codec, parameters):
    blocks = [make_block(parameters, 20 + i, sink_tokens=4 * (i == 0), seed=i) for i in range(3)]
    streams = codec.encode(blocks)
    whole = [codec.decode(stream) for stream in streams]
    for layer in (5, 0):
        group = codec.group_of(layer)
        parts = []
        for stream in streams:
            header = codec.read_header(stream)
            parts.append(
                codec.open_group(header, group, memoryview(stream)[slice(*header.group_span(group))])
            )
        (joined,) = codec.join(parts)
        for given_parts in (parts, [joined]):
            keys, values = codec.decode_layer(given_parts, layer)
            for found, side in ((keys, "keys"), (values, "values")):
                expected = torch.cat([getattr(block, side)[:, layer] for block in whole])
                torch.testing.assert_close(found, expected, rtol=2.0**-7, atol=0.02)


def test_a_plan_without_components_decodes_to_the_mean(parameters):
    group, other = parameters.groups
    nothing = RdPlan(0.2, torch.empty(0, dtype=torch.int64), (0,) * 4, torch.empty(0), torch.empty(2, 0))
    bare = replace(group, values=replace(group.values, plans={1: nothing, 2: nothing}))
    codec = RdCodec(replace(parameters, groups=(bare, other)), ratio=2.0)
    block = make_block(parameters, 9)
    decoded = codec.decode(codec.encode([block])[0])
    mean = group.values.mean.view(3, 2, 16).to(torch.bfloat16)
    assert torch.equal(decoded.values[:, :3], mean.expand(9, -1, -1, -1))
    block.values[3, 2, 1, 0] = torch.nan
    with pytest.raises(EncodeRangeError):
        codec.encode([block])


def test_important_tokens_are_stored_more_finely(parameters):
    """Levels double the scale every second step, so the error of the same rows falls by as much."""
    block = make_block(parameters, 64, noise=0.0)
    errors = []
    for bias in (-4.0, 0.0, 4.0):
        groups = tuple(
            replace(group, values=replace(group.values, importance=torch.zeros_like(group.values.mean),
                                          importance_bias=bias))
            for group in parameters.groups
        )  # fmt: skip
        codec = RdCodec(replace(parameters, groups=groups), ratio=10.0, compute_dtype="float32")
        decoded = codec.decode(codec.encode([block])[0])
        errors.append(relative_error(decoded.values, block.values))
    assert errors[0] > 1.5 * errors[1] and errors[1] > errors[2]


def test_many_threads_may_share_a_codec(parameters):
    blocks = [make_block(parameters, 24, seed=i) for i in range(6)]
    expected = RdCodec(parameters, ratio=2.0, threads=1).encode(blocks)
    shared = RdCodec(parameters, ratio=2.0)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda block: shared.encode([block])[0], blocks)) == expected


def test_weights_differ_between_the_directions(parameters):
    side = parameters.groups[0].keys
    rank = torch.arange(side.basis.shape[0])
    product = side.analysis(rank).double() @ side.synthesis(rank).double().t()
    torch.testing.assert_close(product, torch.eye(len(rank)).double(), rtol=0, atol=1e-4)
    transform = SideTransform(side, rank, GEOMETRY.layer_size, torch.float32)
    coefficients = torch.randn(5, len(rank), generator=torch.Generator().manual_seed(0))
    rows = torch.cat([transform.inverse(coefficients, layer) for layer in range(3)], dim=1)
    torch.testing.assert_close(transform.forward(rows).t(), coefficients, rtol=0, atol=1e-3)


# --- choice of plans and profiles ----------------------------------------------------------------


def test_plans_are_chosen_by_ratio_or_by_divergence(parameters):
    block = make_block(parameters, 12)
    for choice, plan_id in (({"ratio": 2.0}, 1), ({"max_kl": 9.0}, 1), ({"max_kl": 11.0}, 2)):
        codec = open_codec(parameters, **choice)
        assert isinstance(codec, RdCodec)
        assert codec.read_header(codec.encode([block])[0]).plan_id == plan_id
    with pytest.raises(ArtifactMismatchError, match="no plan"):
        RdCodec(parameters, max_kl=1.0)
    with pytest.raises(ValueError, match="not by both"):
        RdCodec(parameters, ratio=2.0, max_kl=9.0)
    with pytest.raises(ArtifactMismatchError, match="decoding only"):
        RdCodec(parameters).encode([block])


def test_the_profile_of_the_parameters_decides_which_codec_is_opened(parameters):
    plain = make_parameters(GEOMETRY)
    assert isinstance(open_codec(plain, ratio=8.0), KvtcCodec)
    with pytest.raises(ArtifactMismatchError, match="chosen by ratio"):
        open_codec(plain, max_kl=0.01)
    with pytest.raises(ArtifactMismatchError, match="open_codec"):
        KvtcCodec(parameters)
    with pytest.raises(ArtifactMismatchError, match="open_codec"):
        RdCodec(plain)


def test_streams_of_the_other_profile_are_refused(codec, parameters):
    plain = make_parameters(GEOMETRY, groups=2)
    (stream,) = KvtcCodec(plain, ratio=8.0).encode([make_block(plain, 12)])
    with pytest.raises(StreamMismatchError, match="profile"):
        codec.read_header(stream)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e9])
@pytest.mark.parametrize("side", ["keys", "values"])
def test_numbers_that_symbols_do_not_hold_are_refused(codec, parameters, bad, side):
    block = make_block(parameters, 12)
    getattr(block, side)[8, 3, 1, 5] = bad
    with pytest.raises(EncodeRangeError, match="raw"):
        codec.encode([block])


def test_a_block_unlike_the_calibration_text_is_refused(parameters):
    block = make_block(parameters, 200)
    loud = replace(block, values=block.values * 60)
    with pytest.raises(EncodeRangeError, match="beyond their classes"):
        RdCodec(parameters, ratio=10.0).encode([loud])


def test_sizes_that_no_plan_gives_are_refused(codec, parameters):
    (stream,) = codec.encode([make_block(parameters, 12)])
    group, other = parameters.groups
    stored = group.keys.plans[1].components.numel()
    wider = replace(group.keys.plans[1], counts=(stored, 0, 0, 0))
    swapped = replace(group, keys=replace(group.keys, plans=dict(group.keys.plans) | {1: wider}))
    with pytest.raises(ChunkTableError, match="KEYS of layer group 0"):
        RdCodec(replace(parameters, groups=(swapped, other))).read_header(stream)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_flipped_bit_is_noticed(codec, parameters, data):
    (stream,) = codec.encode([make_block(parameters, 12, sink_tokens=4)])
    damaged = bytearray(stream)
    bit = data.draw(st.integers(0, 8 * len(stream) - 1))
    damaged[bit // 8] ^= 1 << bit % 8
    with pytest.raises(BitstreamError):
        codec.decode(bytes(damaged))


def test_long_sections_are_cut_into_chunks_that_deflate_takes(parameters):
    codec = RdCodec(parameters, ratio=2.0)
    (stream,) = codec.encode([make_block(parameters, 1500)])
    header = codec.read_header(stream)
    assert len(header.chunks_of(0, SectionKind.KEYS)) > 2
    assert header.header_size == codec.header_bytes(1500, 0)
    assert relative_error(codec.decode(stream).values, make_block(parameters, 1500).values) < 0.2
