"""The trial at start passes for a codec that works, and catches one that does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from synthetic import make_parameters, make_rd_parameters

from dynamo_kvtc.codec.base import TierBlock
from dynamo_kvtc.codec.geometry import KvGeometry
from dynamo_kvtc.codec.gpu import rd_side, scattering
from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.gpu.gpu_codec import GpuCodec
from dynamo_kvtc.codec.gpu.self_test import made_up_blocks, self_test
from dynamo_kvtc.codec.open import open_codec
from dynamo_kvtc.codec.parameters import AnyParameters
from dynamo_kvtc.errors import GpuUnavailableError

GEOMETRY = KvGeometry(num_layers=3, num_kv_heads=2, head_size=16, dtype="bfloat16")


def make(profile: str, gpu: GpuDevice) -> GpuCodec:
    parameters: AnyParameters = (
        make_rd_parameters(GEOMETRY, groups=1)
        if profile == "rd"
        else make_parameters(GEOMETRY, groups=1, ratios=(4.0,))
    )
    ratio = next(iter(parameters.ratios.values()))
    return GpuCodec(open_codec(parameters, ratio=ratio, compute_dtype="float32", threads=1), gpu)


@pytest.mark.parametrize("profile", ["kvtc", "rd"])
def test_a_codec_that_works_passes(gpu: GpuDevice, profile: str) -> None:
    self_test(make(profile, gpu))


@pytest.mark.parametrize("profile", ["kvtc", "rd"])
def test_the_last_block_can_always_be_encoded(gpu: GpuDevice, profile: str) -> None:
    host = make(profile, gpu).host
    *_, last = made_up_blocks(host.parameters)
    assert host.decode(host.encode([last])[0]).num_tokens == last.num_tokens


def test_wrong_rotations_are_noticed(gpu: GpuDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    right = scattering.rotation_tables

    def wrong(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = right(*args, **kwargs)
        return cos, -sin

    codec = make("kvtc", gpu)
    monkeypatch.setattr(scattering, "rotation_tables", wrong)
    with pytest.raises(GpuUnavailableError, match="decodes otherwise than the CPU"):
        self_test(codec)


def test_wrong_symbols_are_noticed(gpu: GpuDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    right = rd_side.unpack_symbols

    def wrong(*args: Any, **kwargs: Any) -> None:
        right(*args, **kwargs)
        coefficients = next(
            one for one in reversed(args) if isinstance(one, torch.Tensor) and one.dtype == torch.bfloat16
        )
        coefficients[: coefficients.shape[0] // 2].neg_()

    codec = make("rd", gpu)
    monkeypatch.setattr(rd_side, "unpack_symbols", wrong)
    with pytest.raises(GpuUnavailableError, match="decodes otherwise than the CPU"):
        self_test(codec)


def test_streams_that_the_cpu_cannot_read_are_noticed(
    gpu: GpuDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    codec = make("rd", gpu)
    right = codec.encode

    def wrong(blocks: list[TierBlock]) -> list[bytes]:
        return [stream[:-17] + bytes([stream[-17] ^ 1]) + stream[-16:] for stream in right(blocks)]

    monkeypatch.setattr(codec, "encode", wrong)
    with pytest.raises(GpuUnavailableError, match=r"the trial of .* failed: ChunkChecksumError"):
        self_test(codec)
