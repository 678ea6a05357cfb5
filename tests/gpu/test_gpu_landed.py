"""Stored bytes in device memory: opened as those on the host are, and refused where those are."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from synthetic import make_block, make_parameters, make_rd_parameters

from dynamo_kvtc.codec.bitstream import StreamHeader
from dynamo_kvtc.codec.entropy import RansCoder
from dynamo_kvtc.codec.geometry import KvGeometry
from dynamo_kvtc.codec.gpu import landed
from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.gpu.gpu_codec import GpuCodec
from dynamo_kvtc.codec.gpu.kernels.xxh3 import CHECKSUM, SHORTEST
from dynamo_kvtc.codec.gpu.landed import checksum_problem
from dynamo_kvtc.codec.gpu.opened import DeviceGroup
from dynamo_kvtc.codec.header import SectionKind
from dynamo_kvtc.codec.open import open_codec
from dynamo_kvtc.codec.transform_codec import TransformCodec
from dynamo_kvtc.errors import (
    ChunkChecksumError,
    GpuUnavailableError,
    KvtcError,
    ReservedBitsError,
    TruncatedStreamError,
)

GEOMETRY = KvGeometry(num_layers=2, num_kv_heads=2, head_size=32, dtype="bfloat16")
TOKENS = 40


@cache
def host_of(profile: str, entropy: str) -> TransformCodec:
    parameters = (
        make_rd_parameters(GEOMETRY, groups=1)
        if profile == "rd"
        else make_parameters(GEOMETRY, groups=1, ratios=(2.0,))
    )
    ratio = next(iter(parameters.ratios.values()))
    coder = RansCoder() if entropy == "rans" else None
    return open_codec(parameters, ratio=ratio, compute_dtype="float32", threads=1, coder=coder)


@cache
def streams_of(profile: str, entropy: str) -> list[bytes]:
    host = host_of(profile, entropy)
    blocks = [make_block(host.parameters, tokens, sink_tokens=2) for tokens in (TOKENS, TOKENS + 5)]
    return host.encode(blocks)


@pytest.fixture(scope="module", params=["kvtc-deflate", "rd-deflate", "kvtc-rans", "rd-rans"])
def made(request: pytest.FixtureRequest, gpu: GpuDevice) -> tuple[GpuCodec, list[StreamHeader], list[bytes]]:
    """A codec with the headers and the only layer groups of two streams."""
    profile, entropy = request.param.split("-")
    codec, streams = GpuCodec(host_of(profile, entropy), gpu), streams_of(profile, entropy)
    headers = [codec.read_header(stream) for stream in streams]
    groups = [stream[slice(*header.group_span(0))] for stream, header in zip(streams, headers, strict=True)]
    return codec, headers, groups


def land(gpu: GpuDevice, payloads: list[bytes]) -> list[torch.Tensor]:
    """Put payloads into one tensor of the device, with other bytes around them."""
    memory = torch.full((256 + sum(len(one) + 32 for one in payloads),), 0xEE, dtype=torch.uint8)
    starts, start = [], 48
    for one in payloads:
        memory[start : start + len(one)] = torch.frombuffer(bytearray(one), dtype=torch.uint8)
        starts.append(start)
        start += -(-len(one) // 16) * 16 + 16
    memory = gpu.upload(memory)
    if gpu.stream is not None:
        gpu.stream.synchronize()
    return [memory[at : at + len(one)] for at, one in zip(starts, payloads, strict=True)]


def assert_same(actual: DeviceGroup | KvtcError, expected: DeviceGroup | KvtcError) -> None:
    assert isinstance(actual, DeviceGroup) and isinstance(expected, DeviceGroup)
    assert torch.equal(actual.keys, expected.keys) and torch.equal(actual.values, expected.values)
    for a, e in zip(actual.segments, expected.segments, strict=True):
        assert torch.equal(a.sink_keys, e.sink_keys) and torch.equal(a.sink_values, e.sink_values)


def test_they_open_to_the_same_bits(gpu: GpuDevice, made: tuple) -> None:
    codec, headers, groups = made
    # The kernel has something to look at, and so has the host.
    sizes = [chunk.stored_size for header in headers for chunk in header.chunks_of(0)]
    assert max(sizes) >= SHORTEST
    expected = codec.open_groups(headers, 0, groups)
    there = land(gpu, groups)
    for actual, wanted in zip(codec.open_groups(headers, 0, there), expected, strict=True):
        assert_same(actual, wanted)
    mixed = codec.open_groups([headers[1], *headers], 0, [there[1], groups[0], there[1]])
    for actual, index in zip(mixed, (1, 0, 1), strict=True):
        assert_same(actual, expected[index])


def test_a_changed_byte_anywhere_is_the_fault_of_its_stream_alone(gpu: GpuDevice, made: tuple) -> None:
    codec, headers, groups = made
    header, sound = headers[0], groups[0]
    start = header.group_span(0)[0]
    payloads: list[bytes] = []
    expected: list[type[KvtcError] | None] = []
    for chunk in header.chunks_of(0):
        for place in {chunk.offset, chunk.offset + chunk.stored_size - 1} if chunk.stored_size else ():
            damaged = bytearray(sound)
            damaged[place - start] ^= 0x40
            payloads += [bytes(damaged), sound]
            expected += [ChunkChecksumError, None]
        end = chunk.offset + chunk.stored_size
        if end % 16:
            damaged = bytearray(sound)
            damaged[end - start] = 1
            payloads.append(bytes(damaged))
            expected.append(ReservedBitsError)
    payloads += [sound[:-1], sound + bytes(1)]
    expected += [TruncatedStreamError, TruncatedStreamError]
    assert ReservedBitsError in expected
    results = codec.open_groups([header] * len(payloads), 0, land(gpu, payloads))
    for result, kind in zip(results, expected, strict=True):
        assert isinstance(result, DeviceGroup) if kind is None else isinstance(result, kind)
    assert {chunk.kind for chunk in header.chunks_of(0)} >= {SectionKind.SINKS, SectionKind.KEYS}


def test_a_device_with_other_checksums_is_not_read_into(
    gpu: GpuDevice, made: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec, *_ = made
    assert checksum_problem(gpu) is None
    assert (codec.landing_problem() is None) == codec._coder.inflates
    right = landed.check_chunks
    monkeypatch.setattr(landed, "check_chunks", lambda *args: right(*args) ^ CHECKSUM)
    assert "not those of the CPU" in str(checksum_problem(gpu))

    def refused(*_: object) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(landed, "check_chunks", refused)
    assert "no such instruction" in str(checksum_problem(gpu))


def test_the_device_has_read_to_the_end_when_a_batch_fails(
    gpu: GpuDevice, made: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error in the middle stands for any; what was launched before it may still read the bytes."""
    codec, headers, groups = made
    recorded: list[object] = []
    record = gpu.record

    def noted(*args: torch.cuda.Stream | None) -> object:
        recorded.append(None)
        return record(*args)

    def fail(*_: object) -> None:
        raise GpuUnavailableError("no memory is left")

    there = land(gpu, groups)
    monkeypatch.setattr(gpu, "record", noted)
    monkeypatch.setattr(type(codec._resident.side(0, SectionKind.VALUES, headers[0].plan_id)), "decode", fail)
    with pytest.raises(GpuUnavailableError):
        codec.open_groups(headers, 0, there)
    assert recorded
    assert codec.budget.taken == 0
