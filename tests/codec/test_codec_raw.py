"""The raw profile returns the very bits it was given."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_kvtc.codec.base import TierBlock
from dynamo_kvtc.codec.bitstream import Section, SectionKind, encode_chunk, write_stream
from dynamo_kvtc.codec.entropy import DeflateCoder, StoreCoder
from dynamo_kvtc.codec.geometry import CACHE_DTYPES, KvGeometry, LayerRange
from dynamo_kvtc.codec.raw import RawCodec
from dynamo_kvtc.errors import BitstreamError, LayoutError, StreamMismatchError


def random_block(geometry: KvGeometry, tokens: int, seed: int = 0, **fields) -> TierBlock:
    """KV with every bit pattern of the dtype, NaN and infinity included."""
    generator = torch.Generator().manual_seed(seed)
    shape = (tokens, geometry.num_layers, geometry.num_kv_heads, geometry.head_size)
    itemsize = geometry.torch_dtype.itemsize

    def side() -> torch.Tensor:
        data = torch.randint(
            0, 256, (*shape[:-1], shape[-1] * itemsize), dtype=torch.uint8, generator=generator
        )
        return data.view(geometry.torch_dtype)

    return TierBlock(side(), side(), **{"first_position": 0, **fields})


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@settings(max_examples=30, deadline=None)
@given(
    layers=st.integers(1, 4),
    heads=st.integers(1, 3),
    head_size=st.sampled_from([1, 2, 6, 64]),
    dtype=st.sampled_from(sorted(CACHE_DTYPES)),
    tokens=st.integers(1, 40),
    position=st.integers(0, 1 << 40),
    deflate=st.booleans(),
    first_group=st.none() | st.integers(1, 4),
)
def test_decoding_is_bit_exact(layers, heads, head_size, dtype, tokens, position, deflate, first_group):
    geometry = KvGeometry(layers, heads, head_size, dtype)
    groups = None
    if first_group is not None:
        first = min(first_group, layers)
        groups = [LayerRange(0, first), *([LayerRange(first, layers - first)] if first < layers else [])]
    codec = RawCodec(geometry, coder=DeflateCoder() if deflate else None, layer_groups=groups)
    block = random_block(
        geometry, tokens, first_position=position, sink_tokens=min(4, tokens), binding=bytes(range(32))
    )
    (stream,) = codec.encode([block])
    decoded = codec.decode(stream, binding=block.binding)
    assert bits(decoded.keys) == bits(block.keys)
    assert bits(decoded.values) == bits(block.values)
    assert (decoded.first_position, decoded.sink_tokens, decoded.binding) == (
        position, block.sink_tokens, block.binding,
    )  # fmt: skip
    header = codec.read_header(stream)
    assert header.header_size == codec.header_bytes(tokens, 0)
    assert header.stream_size == len(stream) <= codec.max_stream_bytes(tokens, 0)
    if not deflate:
        assert len(stream) == codec.max_stream_bytes(tokens, 0)


def test_large_layers_are_cut_into_chunks_and_compressible_ones_shrink():
    geometry = KvGeometry(2, 2, 64)
    block = TierBlock(torch.zeros(300, 2, 2, 64).bfloat16(), torch.ones(300, 2, 2, 64).bfloat16(), 7)
    codec = RawCodec(geometry, coder=DeflateCoder())
    (stream,) = codec.encode([block])
    header = codec.read_header(stream)
    assert [chunk.plain_size for chunk in header.chunks_of(1)] == [65_536, 65_536, 22_528]
    assert len(stream) < codec.max_stream_bytes(300, 0) // 4
    assert bits(codec.decode(stream).values) == bits(block.values)


def test_parts_of_consecutive_blocks_join():
    geometry = KvGeometry(2, 1, 8, "float16")
    codec = RawCodec(geometry)
    blocks = [random_block(geometry, 3, 1), random_block(geometry, 5, 2, first_position=3)]
    parts = []
    for stream in codec.encode(blocks):
        header = codec.read_header(stream)
        start, stop = header.group_span(1)
        parts.append(codec.open_group(header, 1, stream[start:stop]))
    keys, values = codec.decode_layer(parts, 1)
    assert bits(keys) == bits(torch.cat([block.keys[:, 1] for block in blocks]))
    assert bits(values) == bits(torch.cat([block.values[:, 1] for block in blocks]))


def test_a_batch_encodes_as_its_blocks_do():
    geometry = KvGeometry(2, 1, 8)
    codec = RawCodec(geometry)
    blocks = [random_block(geometry, tokens, tokens) for tokens in (1, 4, 9)]
    assert codec.encode(blocks) == [codec.encode([block])[0] for block in blocks]


def test_the_layers_of_a_group_lie_one_after_the_other():
    geometry = KvGeometry(3, 1, 8)
    block = random_block(geometry, 5)
    one = RawCodec(geometry)
    together = RawCodec(geometry, layer_groups=[LayerRange(0, 2), LayerRange(2, 1)])
    streams = [codec.encode([block])[0] for codec in (one, together)]
    payloads = []
    for codec, stream in zip((one, together), streams, strict=True):
        header = codec.read_header(stream)
        payloads.append(
            b"".join(stream[slice(*header.group_span(g))] for g in range(len(header.layer_groups)))
        )
    assert payloads[0] == payloads[1]
    with pytest.raises(StreamMismatchError, match="layer groups"):
        one.read_header(streams[1])


@pytest.mark.parametrize(
    "change",
    [
        {"geometry": KvGeometry(2, 2, 4)},
        {"geometry": KvGeometry(2, 1, 8, "float16")},
        {"artifact_id": b"a" * 32},
    ],
)
def test_a_foreign_stream_is_refused(change):
    own = {"geometry": KvGeometry(2, 1, 8), "artifact_id": bytes(32)}
    (stream,) = RawCodec(**own).encode([random_block(own["geometry"], 4)])
    with pytest.raises(StreamMismatchError):
        RawCodec(**{**own, **change}).read_header(stream)


def test_another_binding_is_refused():
    codec = RawCodec(KvGeometry(1, 1, 8))
    (stream,) = codec.encode([random_block(codec.geometry, 4, binding=b"a" * 32)])
    assert codec.read_header(stream, binding=b"a" * 32).binding == b"a" * 32
    with pytest.raises(StreamMismatchError, match="binding"):
        codec.read_header(stream, binding=b"b" * 32)


def test_a_payload_of_another_length_than_the_tokens_take_is_refused():
    codec = RawCodec(KvGeometry(1, 1, 8))
    (stream,) = codec.encode([random_block(codec.geometry, 4)])
    header = codec.read_header(stream)
    section = Section(codec.layer_groups[0], SectionKind.RAW, [encode_chunk(bytes(100), StoreCoder())])
    forged = write_stream(replace(header, num_tokens=5), [section])
    with pytest.raises(BitstreamError, match="5 tokens"):
        codec.read_header(forged)


@pytest.mark.parametrize(
    "fields",
    [
        {"tokens": 0},
        {"tokens": 4, "sink_tokens": 5},
        {"tokens": 4, "first_position": -1},
        {"tokens": 4, "first_position": 1 << 48},
        {"tokens": 4, "binding": b"short"},
        {"tokens": 4, "geometry": KvGeometry(1, 2, 8)},
        {"tokens": 4, "geometry": KvGeometry(1, 1, 8, "float32")},
    ],
)
def test_a_block_that_no_stream_can_hold_is_refused(fields):
    codec = RawCodec(KvGeometry(1, 1, 8))
    block = random_block(fields.pop("geometry", codec.geometry), **fields)
    with pytest.raises(LayoutError):
        codec.encode([block])
