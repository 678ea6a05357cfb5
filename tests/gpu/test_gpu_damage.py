"""Damaged streams on the device: a typed error for the stream that is damaged, and for no other.

What the CPU's codec refuses the GPU's refuses, and what it takes decodes to the same.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from synthetic import make_block, make_parameters, make_rd_parameters

from dynamo_kvtc.codec.bitstream import EncodedChunk, Section, StreamHeader, read_section, write_stream
from dynamo_kvtc.codec.entropy import DEFLATE, STORE, HuffmanCoder
from dynamo_kvtc.codec.geometry import KvGeometry
from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.gpu.gpu_codec import GpuCodec
from dynamo_kvtc.codec.header import SectionKind
from dynamo_kvtc.codec.open import open_codec
from dynamo_kvtc.codec.transform_codec import TransformCodec
from dynamo_kvtc.errors import (
    BitstreamError,
    ChunkChecksumError,
    EntropyDecodeError,
    KvtcError,
    PayloadError,
    ReservedBitsError,
    TruncatedStreamError,
    UnknownCoderError,
)

GEOMETRY = KvGeometry(num_layers=2, num_kv_heads=2, head_size=16, dtype="bfloat16")
TOKENS = 11
PROFILES = ("kvtc", "rd")


@cache
def host_of(profile: str) -> TransformCodec:
    if profile == "rd":
        parameters: Any = make_rd_parameters(GEOMETRY, groups=1)
    else:
        parameters = make_parameters(GEOMETRY, groups=1, ratios=(2.0,))
    ratio = next(iter(parameters.ratios.values()))
    return open_codec(parameters, ratio=ratio, compute_dtype="float32", threads=1)


@cache
def stream_of(profile: str) -> bytes:
    host = host_of(profile)
    return host.encode([make_block(host.parameters, TOKENS, sink_tokens=2)])[0]


@pytest.fixture(scope="module", params=PROFILES)
def profile(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def device(profile: str, gpu: GpuDevice) -> GpuCodec:
    return GpuCodec(host_of(profile), gpu)


def group(stream: bytes, header: StreamHeader) -> bytearray:
    return bytearray(stream[slice(*header.group_span(0))])


def resealed(profile: str, kind: SectionKind, change: dict[int, int]) -> bytes:
    """Return the stream with bytes of one section's payload replaced, and everything else sound."""
    stream = stream_of(profile)
    header = host_of(profile).read_header(stream)
    payload = group(stream, header)
    sections = []
    for one in (SectionKind.KEYS, SectionKind.VALUES, SectionKind.SINKS):
        plain = read_section(header, 0, one, payload)
        if one is kind:
            for place, value in change.items():
                plain[place] = value
        chunks, start = [], 0
        for chunk in header.chunks_of(0, one):
            chunks.append(EncodedChunk(STORE, chunk.plain_size, plain[start : start + chunk.plain_size]))
            start += chunk.plain_size
        sections.append(Section(header.chunks[0].layers, one, chunks))
    return write_stream(header, sections)


def outcome(codec: TransformCodec | GpuCodec, stream: bytes) -> torch.Tensor | type[KvtcError]:
    """What a codec makes of a stream: its values, or the kind of error."""
    try:
        block = codec.decode(stream)
    except BitstreamError as error:
        return type(error)
    return torch.stack([block.keys, block.values]).cpu().double()


def test_a_changed_byte_anywhere_is_the_fault_of_its_stream_alone(device: GpuCodec, profile: str) -> None:
    stream = stream_of(profile)
    header = device.read_header(stream)
    sound, start = group(stream, header), header.group_span(0)[0]
    payloads, expected = [], []
    for chunk in header.chunks_of(0):
        if not chunk.stored_size:
            continue
        for place in {chunk.offset, chunk.offset + chunk.stored_size - 1}:
            damaged = bytearray(sound)
            damaged[place - start] ^= 0x40
            payloads += [damaged, sound]
            expected += [ChunkChecksumError, None]
    payloads += [sound[:-1], bytearray(sound) + b"\0"]
    expected += [TruncatedStreamError, TruncatedStreamError]
    results = device.open_groups([header] * len(payloads), 0, payloads)
    for result, kind in zip(results, expected, strict=True):
        assert isinstance(result, KvtcError) == (kind is not None)
        assert kind is None or isinstance(result, kind)


def test_padding_behind_a_chunk_must_be_zero(device: GpuCodec, profile: str) -> None:
    stream = stream_of(profile)
    header = device.read_header(stream)
    start = header.group_span(0)[0]
    ends = [chunk.offset + chunk.stored_size - start for chunk in header.chunks_of(0)]
    end = next(end for end in ends if end % 16)
    damaged = group(stream, header)
    damaged[end] = 1
    (result,) = device.open_groups([header], 0, [damaged])
    assert isinstance(result, ReservedBitsError)


@pytest.mark.parametrize("what", ["not deflate", "too long", "too short", "unknown coder"])
def test_chunks_with_sound_checksums_that_do_not_inflate(device: GpuCodec, profile: str, what: str) -> None:
    """Nobody writes these: a decoder must not depend on it."""
    stream = stream_of(profile)
    header = device.read_header(stream)
    payload = group(stream, header)
    chunks = header.chunks_of(0, SectionKind.KEYS)
    plain = bytes(read_section(header, 0, SectionKind.KEYS, payload))
    coder_id, data = DEFLATE, b"\xff" * 40
    if what == "too long":
        data = HuffmanCoder().encode(bytes(len(plain) + 1))
    elif what == "too short":
        data = HuffmanCoder().encode(bytes(len(plain) - 1))
    elif what == "unknown coder":
        coder_id = 77
    layers = header.chunks[0].layers
    assert len(chunks) == 1
    sections = [Section(layers, SectionKind.KEYS, [EncodedChunk(coder_id, len(plain), data)])]
    for kind in (SectionKind.VALUES, SectionKind.SINKS):
        plain = bytes(read_section(header, 0, kind, payload))
        sections.append(Section(layers, kind, [EncodedChunk(STORE, len(plain), plain)]))
    broken = write_stream(replace(header, chunks=()), sections)
    found = device.read_header(broken)
    good = device.read_header(stream)
    results = device.open_groups([good, found], 0, [payload, group(broken, found)])
    assert not isinstance(results[0], KvtcError)
    assert isinstance(results[1], UnknownCoderError if what == "unknown coder" else EntropyDecodeError)
    with pytest.raises(type(results[1])):
        host_of(profile).decode(broken)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), kind=st.sampled_from([SectionKind.KEYS, SectionKind.VALUES]))
def test_payloads_that_no_encoder_writes_are_judged_as_on_the_cpu(
    device: GpuCodec, profile: str, data: st.DataObject, kind: SectionKind
) -> None:
    size = host_of(profile).read_header(stream_of(profile)).section_size(0, kind)
    if not size:
        return
    values = st.one_of(st.sampled_from([0, 0x80, 0xFF, 0x7F, 0xF0, 0x88, 243]), st.integers(0, 255))
    change = data.draw(st.dictionaries(st.integers(0, size - 1), values, min_size=1, max_size=3))
    stream = resealed(profile, kind, change)
    expected, found = outcome(host_of(profile), stream), outcome(device, stream)
    if isinstance(expected, torch.Tensor):
        assert isinstance(found, torch.Tensor)
        scale = expected.pow(2).mean().sqrt() + 2.0**-8 * expected.abs().max()
        assert (found - expected).pow(2).mean().sqrt() <= 0.01 * scale
    else:
        # Where there is more than one thing wrong, either may be named.
        assert isinstance(found, type)
        assert issubclass(found, BitstreamError)


def test_the_kinds_of_faults_have_names(gpu: GpuDevice) -> None:
    """Symbols beyond their class, and bits behind the last token, in the rd profile's payload."""
    host = host_of("rd")
    device = GpuCodec(host, gpu)
    header = host.read_header(stream_of("rd"))
    layout = host._side(0, SectionKind.KEYS, header.plan_id)._layout  # type: ignore[attr-defined]
    coded = header.num_tokens - header.sink_tokens
    size = header.section_size(0, SectionKind.KEYS)
    _, byte, nibble, trit = layout.class_sizes(coded)
    faults: dict[int, tuple[int, type[KvtcError]]] = {}
    if trit:
        faults[size - trit] = (255, PayloadError)
        faults[size - 1] = (242, ReservedBitsError)
    if nibble:
        faults[size - trit - nibble] = (0x08, PayloadError)
    if byte:
        faults[size - trit - nibble - byte] = (0x80, PayloadError)
    assert len(faults) >= 2
    for place, (value, kind) in faults.items():
        found = outcome(device, resealed("rd", SectionKind.KEYS, {place: value}))
        assert found is outcome(host, resealed("rd", SectionKind.KEYS, {place: value}))
        assert found is kind or (isinstance(found, type) and issubclass(found, BitstreamError))
