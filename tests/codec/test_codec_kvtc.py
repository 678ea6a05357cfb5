"""The fast codec: sizes, layer access, batches, dtypes, sinks, and refusal of foreign and damaged streams."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import make_block, make_parameters

from dynamo_kvtc.codec.base import TierBlock
from dynamo_kvtc.codec.bitstream import SectionKind, parse_header
from dynamo_kvtc.codec.entropy import StoreCoder
from dynamo_kvtc.codec.geometry import KvGeometry
from dynamo_kvtc.codec.kvtc import KvtcCodec
from dynamo_kvtc.codec.parameters import CodecParameters
from dynamo_kvtc.codec.plan import BitPlan
from dynamo_kvtc.codec.raw import RawCodec
from dynamo_kvtc.codec.rope import RopeParameters
from dynamo_kvtc.errors import (
    ArtifactMismatchError,
    BitstreamError,
    ChunkChecksumError,
    ChunkTableError,
    EncodeRangeError,
    LayoutError,
    RopeError,
    StreamMismatchError,
    UnsupportedVersionError,
)

GEOMETRY = KvGeometry(num_layers=6, num_kv_heads=2, head_size=16)


@pytest.fixture(scope="module")
def parameters() -> CodecParameters:
    return make_parameters(GEOMETRY, groups=2, ratios=(4.0, 8.0))


@pytest.fixture(scope="module")
def codec(parameters) -> KvtcCodec:
    return KvtcCodec(parameters, ratio=4.0)


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


GEOMETRIES = [
    KvGeometry(1, 1, 2),
    KvGeometry(2, 1, 64, "float16"),  # MQA
    KvGeometry(3, 5, 6, "float32"),  # odd numbers of layers and heads
    KvGeometry(4, 8, 24),  # MHA
]


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize(("tokens", "sinks"), [(1, 0), (1, 1), (33, 4)])
def test_round_trip(geometry, tokens, sinks, compute_dtype):
    parameters = make_parameters(geometry, groups=min(2, geometry.num_layers), ratios=(2.5,))
    codec = KvtcCodec(parameters, ratio=2.5, compute_dtype=compute_dtype, threads=1)
    block = make_block(parameters, tokens, first_position=100, sink_tokens=sinks)
    (stream,) = codec.encode([block])
    decoded = codec.decode(stream)
    assert (decoded.first_position, decoded.sink_tokens) == (100, sinks)
    for name in ("keys", "values"):
        wanted, found = getattr(block, name), getattr(decoded, name)
        assert found.shape == wanted.shape and found.dtype is geometry.torch_dtype
        assert relative_error(found[:sinks], wanted[:sinks]) < 0.04 if sinks else True
        # Means and sinks come back however few components a tiny geometry's budget pays for.
        assert relative_error(found, wanted) < 0.75


def test_more_bits_give_a_smaller_error_at_a_larger_size(parameters):
    block = make_block(parameters, 64)
    errors, sizes = [], []
    for ratio in (4.0, 8.0):
        codec = KvtcCodec(parameters, ratio=ratio)
        (stream,) = codec.encode([block])
        errors.append(relative_error(codec.decode(stream).keys, block.keys))
        sizes.append(len(stream))
    assert errors[0] < errors[1] < 0.3
    assert sizes[0] > sizes[1]


@settings(deadline=None, max_examples=15)
@given(tokens=st.integers(1, 80), sinks=st.integers(0, 5), sink_bits=st.sampled_from([8, 16]))
def test_sizes_are_known_before_encoding(parameters, tokens, sinks, sink_bits):
    sinks = min(sinks, tokens)
    for coder, exact in ((None, False), (StoreCoder(), True)):
        codec = KvtcCodec(parameters, ratio=8.0, sink_bits=sink_bits, threads=1, coder=coder)
        (stream,) = codec.encode([make_block(parameters, tokens, sink_tokens=sinks)])
        assert codec.header_bytes(tokens, sinks) == codec.read_header(stream).header_size
        limit = codec.max_stream_bytes(tokens, sinks)
        assert len(stream) == limit if exact else len(stream) <= limit


def test_long_sections_are_cut_into_chunks_that_deflate_takes(parameters):
    codec = KvtcCodec(parameters, ratio=4.0)
    (stream,) = codec.encode([make_block(parameters, 3000)])
    header = codec.read_header(stream)
    assert len(header.chunks_of(0, SectionKind.KEYS)) > 2
    assert max(chunk.plain_size for chunk in header.chunks) <= 65_536
    assert header.header_size == codec.header_bytes(3000, 0)


def test_a_stream_does_not_depend_on_its_batch_or_on_threads(parameters):
    blocks = [
        make_block(parameters, 32, first_position=32 * i, sink_tokens=4 * (i == 0), seed=i) for i in range(4)
    ]
    codec = KvtcCodec(parameters, ratio=4.0, threads=3)
    together = codec.encode(blocks)
    assert together == [codec.encode([block])[0] for block in blocks]
    assert together == KvtcCodec(parameters, ratio=4.0, threads=1).encode(blocks)


def test_a_layer_decodes_alone_and_with_the_blocks_behind_it(codec, parameters):
    sinks = (4, 0, 2)
    blocks = [
        make_block(parameters, 20 + i, first_position=50 * i, sink_tokens=sinks[i], seed=i) for i in range(3)
    ]
    streams = codec.encode(blocks)
    whole = [codec.decode(stream) for stream in streams]
    headers = [codec.read_header(stream) for stream in streams]
    for layer in (5, 0, 3):
        group = codec.group_of(layer)
        parts = []
        for header, stream in zip(headers, streams, strict=True):
            first, stop = header.group_span(group)
            parts.append(codec.open_group(header, group, memoryview(stream)[first:stop]))
        keys, values = codec.decode_layer(parts, layer)
        assert torch.equal(keys, torch.cat([block.keys[:, layer] for block in whole]))
        assert torch.equal(values, torch.cat([block.values[:, layer] for block in whole]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_sinks_at_16_bits_come_back_exactly(dtype):
    parameters = make_parameters(replace(GEOMETRY, dtype=dtype))
    block = make_block(parameters, 10, sink_tokens=4)
    codec = KvtcCodec(parameters, ratio=8.0, sink_bits=16)
    decoded = codec.decode(codec.encode([block])[0])
    assert torch.equal(decoded.keys[:4], block.keys[:4])
    assert torch.equal(decoded.values[:4], block.values[:4])


def test_a_block_of_sinks_only(codec, parameters):
    block = make_block(parameters, 3, sink_tokens=3)
    (stream,) = codec.encode([block])
    assert parse_header(stream).section_size(0, SectionKind.KEYS) == 0
    assert relative_error(codec.decode(stream).keys, block.keys) < 0.04


def test_positions_beyond_the_blocks_are_honoured(parameters):
    """The same KV before rotation, at two places of a sequence, has the same coefficients."""
    codec = KvtcCodec(parameters, ratio=4.0, compute_dtype="float32")
    near, far = (make_block(parameters, 16, first_position=p) for p in (0, 100_000))
    assert not torch.equal(near.keys, far.keys)
    decoded = codec.decode(codec.encode([far])[0])
    assert relative_error(decoded.keys, far.keys) == pytest.approx(
        relative_error(codec.decode(codec.encode([near])[0]).keys, near.keys), rel=0.05
    )


@pytest.mark.parametrize(
    "change",
    [
        {"rotary_dim": 8},
        {"style": "interleaved"},
        {"scaling": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
    ],
    ids=["partial", "interleaved", "yarn"],
)
def test_rotations(change):
    rope = replace(RopeParameters(theta=10_000.0, rotary_dim=16), **change)
    parameters = make_parameters(GEOMETRY, rope=rope, ratios=(4.0,))
    codec = KvtcCodec(parameters, ratio=4.0)
    block = make_block(parameters, 32, first_position=5000)
    assert relative_error(codec.decode(codec.encode([block])[0]).keys, block.keys) < 0.3


def test_a_plan_without_groups_decodes_to_the_mean():
    made = make_parameters(GEOMETRY)
    (group,) = made.groups
    bare = replace(group, values=replace(group.values, plans={1: BitPlan(())}))
    codec = KvtcCodec(replace(made, groups=(bare,)), ratio=8.0)
    block = make_block(made, 9)
    decoded = codec.decode(codec.encode([block])[0])
    mean = group.values.mean.view(6, 2, 16).to(torch.bfloat16)
    assert torch.equal(decoded.values, mean.expand(9, -1, -1, -1))
    block.values[3, 2, 1, 0] = torch.nan
    with pytest.raises(EncodeRangeError):
        codec.encode([block])


def test_large_float16_numbers_do_not_turn_into_infinity():
    parameters = make_parameters(replace(GEOMETRY, dtype="float16"), ratios=(8.0,))
    mean = parameters.groups[0].values.mean
    mean.fill_(65_000.0)
    block = make_block(parameters, 32, noise=0.0)
    block = replace(block, values=block.values.clamp(max=65_504.0))
    codec = KvtcCodec(parameters, ratio=8.0)
    assert torch.isfinite(codec.decode(codec.encode([block])[0]).values).all()


def test_many_threads_may_share_a_codec(parameters):
    blocks = [make_block(parameters, 24, seed=i) for i in range(6)]
    expected = KvtcCodec(parameters, ratio=4.0, threads=1).encode(blocks)
    shared = KvtcCodec(parameters, ratio=4.0)

    def work(block: TierBlock) -> tuple[bytes, torch.Tensor]:
        (stream,) = shared.encode([block])
        return stream, shared.decode(stream).keys

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(work, blocks))
    assert [stream for stream, _ in results] == expected


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("token", [1, 8])
def test_numbers_that_are_not_finite_are_refused(codec, parameters, bad, side, token):
    block = make_block(parameters, 12, sink_tokens=4)
    getattr(block, side)[token, 3, 1, 5] = bad
    with pytest.raises(EncodeRangeError):
        codec.encode([block])


def test_coefficients_beyond_the_side_data_are_refused():
    parameters = make_parameters(replace(GEOMETRY, dtype="float32"))
    block = make_block(parameters, 12)
    block.values[5] *= 1e6
    with pytest.raises(EncodeRangeError, match="raw"):
        KvtcCodec(parameters, ratio=8.0).encode([block])


def test_blocks_of_another_layout_are_refused(codec, parameters):
    block = make_block(parameters, 12)
    for wrong in (
        replace(block, keys=block.keys.float()),
        replace(block, values=block.values[:, :5]),
        replace(block, sink_tokens=13),
        replace(block, binding=b"short"),
    ):
        with pytest.raises(LayoutError):
            codec.encode([block, wrong])


def test_streams_of_others_are_refused(codec, parameters):
    block = make_block(parameters, 12)
    (stream,) = codec.encode([block])
    foreign = [
        replace(parameters, artifact_id=bytes(32)),
        make_parameters(replace(GEOMETRY, dtype="float16"), groups=2, ratios=(4.0, 8.0)),
        make_parameters(GEOMETRY, groups=3, ratios=(4.0, 8.0)),
    ]
    for other in foreign:
        with pytest.raises(StreamMismatchError):
            KvtcCodec(other).read_header(stream)
    with pytest.raises(StreamMismatchError, match="binding"):
        codec.read_header(stream, binding=bytes([1]) * 32)
    with pytest.raises(StreamMismatchError, match="profile"):
        codec.read_header(RawCodec(GEOMETRY, parameters.artifact_id).encode([block])[0])


def test_unknown_plans_and_sizes_that_no_plan_gives_are_refused(codec, parameters):
    (stream,) = codec.encode([make_block(parameters, 12)])
    unknown = replace(parameters, ratios={7: 4.0})
    with pytest.raises(UnsupportedVersionError, match="bit plan 1"):
        KvtcCodec(unknown).read_header(stream)
    swapped = tuple(
        replace(group, keys=replace(group.keys, plans={1: group.keys.plans[2], 2: group.keys.plans[1]}))
        for group in parameters.groups
    )
    with pytest.raises(ChunkTableError, match="KEYS of layer group 0"):
        KvtcCodec(replace(parameters, groups=swapped)).read_header(stream)


def test_a_decoder_takes_the_plan_of_the_stream(codec, parameters):
    (stream,) = codec.encode([make_block(parameters, 12)])
    reader = KvtcCodec(parameters)
    assert torch.equal(reader.decode(stream).keys, codec.decode(stream).keys)
    with pytest.raises(ArtifactMismatchError, match="ratio"):
        reader.encode([make_block(parameters, 12)])
    with pytest.raises(ArtifactMismatchError, match="no bit plan"):
        KvtcCodec(parameters, ratio=5.0)


def test_bad_arguments_are_refused(parameters):
    for wrong in ({"sink_bits": 4}, {"threads": 0}, {"compute_dtype": "int8"}):
        with pytest.raises(ValueError):
            KvtcCodec(parameters, ratio=4.0, **wrong)
    with pytest.raises(RopeError, match="heads have 16"):
        KvtcCodec(replace(parameters, rope=RopeParameters(theta=1e4, rotary_dim=32)))


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_flipped_bit_is_noticed(codec, parameters, data):
    (stream,) = codec.encode([make_block(parameters, 12, sink_tokens=4)])
    damaged = bytearray(stream)
    bit = data.draw(st.integers(0, 8 * len(stream) - 1))
    damaged[bit // 8] ^= 1 << bit % 8
    with pytest.raises(BitstreamError):
        codec.decode(bytes(damaged))


def test_damage_in_one_group_leaves_the_others_readable(codec, parameters):
    (stream,) = codec.encode([make_block(parameters, 12)])
    header = codec.read_header(stream)
    damaged = bytearray(stream)
    damaged[header.group_span(0)[0]] ^= 1
    spans = [memoryview(damaged)[slice(*header.group_span(group))] for group in range(2)]
    with pytest.raises(ChunkChecksumError):
        codec.open_group(header, 0, spans[0])
    part = codec.open_group(header, 1, spans[1])
    assert torch.equal(codec.decode_layer([part], 4)[0], codec.decode(stream).keys[:, 4])


def test_a_warm_codec_gives_the_same_streams_and_makes_no_weights_later(parameters, monkeypatch):
    block = make_block(parameters, 40, sink_tokens=4)
    expected = KvtcCodec(parameters, ratio=4.0).encode([block])
    codec = KvtcCodec(parameters, ratio=4.0)
    codec.warm_up()
    # Without the basis, weights that are not there yet could not be made.
    for side in codec._sides.values():
        monkeypatch.setattr(
            side._transform,
            "_side",
            replace(
                side._transform._side, basis=torch.empty(0, side._transform._side.basis.shape[1]), plans={}
            ),
        )
    streams = codec.encode([block])
    assert streams == expected
    assert torch.equal(
        codec.decode(streams[0]).keys, KvtcCodec(parameters, ratio=4.0).decode(streams[0]).keys
    )
