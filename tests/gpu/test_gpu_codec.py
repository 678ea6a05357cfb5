"""`GpuCodec` against the CPU's codecs: the same format both ways, values within the stated tolerance."""

from __future__ import annotations

import pytest
import torch
from synthetic import make_block, make_parameters, make_rd_parameters

from dynamo_kvtc.codec.base import TierBlock
from dynamo_kvtc.codec.geometry import KvGeometry
from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.gpu.gpu_codec import GpuCodec
from dynamo_kvtc.codec.open import open_codec
from dynamo_kvtc.codec.parameters import AnyParameters
from dynamo_kvtc.codec.transform_codec import TransformCodec

GEOMETRY = KvGeometry(num_layers=4, num_kv_heads=2, head_size=16, dtype="bfloat16")
#: Largest root-mean-square difference to the CPU's float32 products, of that of the centred rows
#: (`docs/bitstream.md`, section 8).
TOLERANCE = 0.01


def make(profile: str, geometry: KvGeometry = GEOMETRY, groups: int = 2) -> AnyParameters:
    if profile == "rd":
        return make_rd_parameters(geometry, groups=groups)
    return make_parameters(geometry, groups=groups, ratios=(4.0,))


def codecs(parameters: AnyParameters, gpu: GpuDevice, sink_bits: int = 8) -> tuple[TransformCodec, GpuCodec]:
    ratio = next(iter(parameters.ratios.values()))
    host = open_codec(parameters, ratio=ratio, sink_bits=sink_bits, compute_dtype="float32", threads=1)
    return host, GpuCodec(host, gpu)


def blocks_of(parameters: AnyParameters, *sizes: int, sinks: int = 4) -> list[TierBlock]:
    whole = make_block(parameters, sum(sizes))
    blocks, start = [], 0
    for size in sizes:
        part = slice(start, start + size)
        binding = bytes([size % 256]) * 32
        blocks.append(
            TierBlock(whole.keys[part], whole.values[part], start, sinks if start == 0 else 0, binding)
        )
        start += size
    return blocks


def assert_close(actual: TierBlock, expected: TierBlock, parameters: AnyParameters) -> None:
    """Compare what two decoders make of one stream."""
    for name in ("keys", "values"):
        a, e = getattr(actual, name).double(), getattr(expected, name).double()
        means = torch.cat([getattr(group, name).mean for group in parameters.groups]).view(e.shape[1:])
        centred = (e - means if name == "values" else e).pow(2).mean((0, 2, 3)).sqrt()
        rounding = 2.0**-8 * e.abs().amax((0, 2, 3))
        assert ((a - e).pow(2).mean((0, 2, 3)).sqrt() <= TOLERANCE * centred + rounding / 2).all()


@pytest.mark.parametrize("profile", ["kvtc", "rd"])
def test_streams_decode_on_either_side(gpu: GpuDevice, profile: str) -> None:
    parameters = make(profile)
    host, device = codecs(parameters, gpu)
    blocks = blocks_of(parameters, 24, 16)
    for streams in (device.encode(blocks), host.encode(blocks)):
        for block, stream in zip(blocks, streams, strict=True):
            expected = host.decode(stream, binding=block.binding)
            actual = device.decode(stream, binding=block.binding)
            assert actual.first_position == block.first_position
            assert actual.sink_tokens == block.sink_tokens
            assert_close(actual, expected, parameters)
            sinks = block.sink_tokens
            assert torch.equal(actual.keys[:sinks], expected.keys[:sinks])
            assert torch.equal(actual.values[:sinks], expected.values[:sinks])


@pytest.mark.parametrize("profile", ["kvtc", "rd"])
def test_gpu_streams_lose_no_more_than_the_cpus(gpu: GpuDevice, profile: str) -> None:
    parameters = make(profile)
    host, device = codecs(parameters, gpu)
    (block,) = blocks_of(parameters, 24)
    errors = []
    for codec in (host, device):
        decoded = host.decode(codec.encode([block])[0])
        errors.append((decoded.values.double() - block.values.double()).pow(2).mean())
    assert errors[1] <= 1.05 * errors[0]
