"""Raw streams beside an artifact's: each decodes exactly as with the codec of its own profile."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import make_block, make_parameters, make_rd_parameters

from dynamo_kvtc.codec.base import KvCodec
from dynamo_kvtc.codec.bitstream import Profile, peek_profile
from dynamo_kvtc.codec.geometry import KvGeometry, LayerRange
from dynamo_kvtc.codec.mixed import MixedCodec
from dynamo_kvtc.codec.open import open_codec
from dynamo_kvtc.codec.raw import RawCodec
from dynamo_kvtc.errors import BitstreamError, LayoutError, StreamMismatchError

GEOMETRY = KvGeometry(4, 2, 8, "bfloat16")
PARAMETERS = {
    "kvtc": make_parameters(GEOMETRY, groups=2, ratios=(4.0,)),
    "rd": make_rd_parameters(GEOMETRY, groups=2, steps=(0.1,)),
}


def codecs(profile: str) -> tuple[MixedCodec, KvCodec, RawCodec]:
    parameters = PARAMETERS[profile]
    coded = open_codec(parameters, ratio=next(iter(parameters.ratios.values())), threads=1)
    raw = RawCodec(GEOMETRY, parameters.artifact_id, layer_groups=coded.layer_groups)
    return MixedCodec(coded, raw), coded, raw


@settings(max_examples=25, deadline=None)
@given(
    profile=st.sampled_from(["kvtc", "rd"]),
    tokens=st.lists(st.integers(5, 20), min_size=1, max_size=5),
    is_raw=st.lists(st.booleans(), min_size=5, max_size=5),
    joined=st.booleans(),
)
def test_a_sequence_of_both_decodes_as_its_blocks_do(profile, tokens, is_raw, joined):
    mixed, coded, raw = codecs(profile)
    starts = [0]
    for count in tokens:
        starts.append(starts[-1] + count)
    blocks = [
        make_block(PARAMETERS[profile], stop - start, first_position=start, sink_tokens=4 if not start else 0)
        for start, stop in pairwise(starts)
    ]
    own = [raw if wanted else coded for wanted in is_raw[: len(blocks)]]
    streams = [codec.encode([block])[0] for codec, block in zip(own, blocks, strict=True)]
    expected = [codec.decode(stream) for codec, stream in zip(own, streams, strict=True)]
    headers = [mixed.read_header(stream) for stream in streams]
    assert [header.profile is Profile.RAW for header in headers] == is_raw[: len(blocks)]
    for header, block in zip(headers, blocks, strict=True):
        assert header.header_size <= mixed.max_header_bytes(block.num_tokens, block.sink_tokens)
    for group, layers in enumerate(mixed.layer_groups):
        parts = [
            mixed.open_group(header, group, stream[slice(*header.group_span(group))])
            for header, stream in zip(headers, streams, strict=True)
        ]
        parts = mixed.join(parts) if joined else parts
        for layer in range(layers.first, layers.stop):
            keys, values = mixed.decode_layer(parts, layer)
            for found, side in ((keys, "keys"), (values, "values")):
                wanted = torch.cat([getattr(block, side)[:, layer] for block in expected])
                # One product over joined streams may round otherwise than one for each.
                torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)
    for stream, block, wanted in zip(streams, blocks, is_raw, strict=False):
        if wanted:
            assert torch.equal(mixed.decode(stream).keys, block.keys)


def test_it_encodes_with_the_artifact_s_codec():
    mixed, coded, _ = codecs("rd")
    block = make_block(PARAMETERS["rd"], 16, sink_tokens=4)
    assert mixed.encode([block]) == coded.encode([block])
    assert mixed.max_stream_bytes(16, 4) == coded.max_stream_bytes(16, 4)


@pytest.mark.parametrize("data", [b"", b"\x89KVTC\r\n\x1a", bytes(200)])
def test_what_is_no_header_is_refused(data):
    mixed, _, _ = codecs("kvtc")
    assert peek_profile(data) in (None, 0)
    with pytest.raises(BitstreamError):
        mixed.read_header(data)


def test_raw_streams_of_another_artifact_are_refused():
    mixed, _, _ = codecs("kvtc")
    foreign = RawCodec(GEOMETRY, b"x" * 32, layer_groups=mixed.layer_groups)
    with pytest.raises(StreamMismatchError, match="artifact"):
        mixed.read_header(foreign.encode([make_block(PARAMETERS["kvtc"], 8)])[0])


def test_the_two_must_be_cut_alike():
    _, coded, _ = codecs("kvtc")
    with pytest.raises(LayoutError, match="layer groups"):
        MixedCodec(coded, RawCodec(GEOMETRY))
    with pytest.raises(LayoutError, match="geometry"):
        MixedCodec(coded, RawCodec(KvGeometry(4, 2, 16), layer_groups=[LayerRange(0, 2), LayerRange(2, 2)]))
