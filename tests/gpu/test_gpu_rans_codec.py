"""`GpuCodec` with rANS: streams of either side, of both coders in a batch, damage its own stream's alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from synthetic import make_block, make_rd_parameters

from dynamo_kvtc.codec.base import TierBlock
from dynamo_kvtc.codec.bitstream import EncodedChunk, Section, write_stream
from dynamo_kvtc.codec.entropy import DEFLATE, RANS, STORE, EntropyCoder, HuffmanCoder, RansCoder
from dynamo_kvtc.codec.geometry import KvGeometry
from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.gpu.gpu_codec import GpuCodec
from dynamo_kvtc.codec.gpu.rans_batch import RansBatchCoder
from dynamo_kvtc.codec.gpu.self_test import self_test
from dynamo_kvtc.codec.header import SectionKind
from dynamo_kvtc.codec.open import open_codec
from dynamo_kvtc.codec.parameters import AnyParameters
from dynamo_kvtc.codec.transform_codec import TransformCodec
from dynamo_kvtc.errors import EntropyDecodeError, KvtcError

PARAMETERS = make_rd_parameters(KvGeometry(2, 2, 16, "bfloat16"), groups=1)

#: As few as chunks shrink with: the interpreter takes its time.
TOKENS = 24


def host_of(coder: EntropyCoder, parameters: AnyParameters = PARAMETERS) -> TransformCodec:
    ratio = next(iter(parameters.ratios.values()))
    return open_codec(parameters, ratio=ratio, compute_dtype="float32", threads=1, coder=coder)


def coders_of(codec: TransformCodec | GpuCodec, stream: bytes) -> set[int]:
    return {chunk.coder_id for chunk in codec.read_header(stream).chunks if chunk.kind != SectionKind.SINKS}


@pytest.fixture(scope="module")
def block() -> TierBlock:
    return make_block(PARAMETERS, TOKENS, sink_tokens=2)


@pytest.fixture(scope="module")
def streams(block: TierBlock) -> dict[int, bytes]:
    """The CPU's streams, by coder."""
    found = {coder.coder_id: host_of(coder).encode([block])[0] for coder in (HuffmanCoder(), RansCoder())}
    for coder_id, stream in found.items():
        assert coders_of(host_of(RansCoder()), stream) == {coder_id}
    return found


def same(a: TierBlock, b: TierBlock) -> bool:
    return torch.equal(a.keys.cpu(), b.keys.cpu()) and torch.equal(a.values.cpu(), b.values.cpu())


def test_either_side_reads_what_the_device_writes(gpu: GpuDevice, block: TierBlock) -> None:
    host = host_of(RansCoder())
    device = GpuCodec(host, gpu)
    (stream,) = device.encode([block])
    assert coders_of(device, stream) == {RANS}
    # Another coder is another way to store the same payload.
    other = GpuCodec(host_of(HuffmanCoder()), gpu).encode([block])[0]
    assert same(host.decode(stream), host.decode(other))
    assert same(device.decode(stream), device.decode(other))


def test_one_batch_holds_streams_of_both_coders(gpu: GpuDevice, streams: dict[int, bytes]) -> None:
    """Whatever the device encodes with, and whoever else encoded."""
    for coder in (HuffmanCoder(), RansCoder()):
        device = GpuCodec(host_of(coder), gpu)
        order = [DEFLATE, RANS, RANS, DEFLATE]
        headers = [device.read_header(streams[one]) for one in order]
        payloads = [
            streams[one][slice(*header.group_span(0))] for one, header in zip(order, headers, strict=True)
        ]
        opened = device.open_groups(headers, 0, payloads)
        assert not any(isinstance(part, KvtcError) for part in opened)
        for part in opened[1:]:
            assert torch.equal(part.keys, opened[0].keys)
            assert torch.equal(part.values, opened[0].values)


@pytest.mark.parametrize("what", ["tables", "words"])
def test_a_chunk_that_is_none_spoils_its_stream_alone(
    gpu: GpuDevice, streams: dict[int, bytes], what: str
) -> None:
    """Checksums are sound: nobody writes these, and a decoder must not depend on it."""
    host = host_of(RansCoder())
    device = GpuCodec(host, gpu)
    header = host.read_header(streams[RANS])
    sections = []
    for kind in (SectionKind.KEYS, SectionKind.VALUES, SectionKind.SINKS):
        chunks = []
        for chunk in header.chunks_of(0, kind):
            data = bytearray(streams[RANS][chunk.offset : chunk.offset + chunk.stored_size])
            if kind is SectionKind.VALUES and what == "tables":
                data[0] = 17
            elif kind is SectionKind.VALUES and what == "words":
                data[-1] ^= 0x10
            chunks.append(EncodedChunk(chunk.coder_id, chunk.plain_size, bytes(data)))
        sections.append(Section(header.chunks[0].layers, kind, chunks))
    broken = write_stream(replace(header, chunks=()), sections)
    found = device.read_header(broken)
    both = [device.read_header(streams[RANS]), found, device.read_header(streams[DEFLATE])]
    whole = [streams[RANS], broken, streams[DEFLATE]]
    payloads = [stream[slice(*one.group_span(0))] for stream, one in zip(whole, both, strict=True)]
    results = device.open_groups(both, 0, payloads)
    assert isinstance(results[1], EntropyDecodeError)
    assert not isinstance(results[0], KvtcError)
    assert not isinstance(results[2], KvtcError)
    with pytest.raises(EntropyDecodeError):
        host.decode(broken)


def test_chunks_that_do_not_shrink_are_stored(gpu: GpuDevice) -> None:
    host = host_of(RansCoder())
    device = GpuCodec(host, gpu)
    (stream,) = device.encode([make_block(PARAMETERS, 3)])
    assert coders_of(device, stream) == {STORE}
    assert device.decode(stream).num_tokens == host.decode(stream).num_tokens == 3


def test_the_trial_at_start_goes_through_it(gpu: GpuDevice) -> None:
    device = GpuCodec(host_of(RansCoder()), gpu)
    assert isinstance(device._coder, RansBatchCoder)
    self_test(device)


def test_what_it_takes_is_planned_for(gpu: GpuDevice) -> None:
    """Memory comes from `encode_bytes`; its tensors are those that the coder allocates."""
    coder = RansBatchCoder(gpu)
    assert coder.encode_bytes([100, 65_536]) >= 112 + 65_536 + (1 + 16) * (4 * 256 + 8 * 256 + 162)
    assert coder.encode_bytes([]) == 0
