"""From a configuration to an adapter that works on the engine's device, and what is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from random_rd import write_random_rd_artifact

from dynamo_kvtc.codec.geometry import KvGeometry, LayerRange
from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.config import Config
from dynamo_kvtc.errors import ConfigError, GpuUnavailableError
from dynamo_kvtc.pipeline.assemble import open_adapter
from dynamo_kvtc.pipeline.blocks import SequenceBlocks
from dynamo_kvtc.pipeline.boundary import DeviceBoundary, HostBoundary
from dynamo_kvtc.pipeline.paged import PagedKvCache

GEOMETRY = KvGeometry(num_layers=3, num_kv_heads=2, head_size=16, dtype="float32")


def config(folder: Path, **codec: Any) -> Config:
    groups = [LayerRange(0, GEOMETRY.num_layers)]
    artifact = write_random_rd_artifact(folder / "artifact", geometry=GEOMETRY, groups=groups)
    return Config.model_validate(
        {
            "artifact": artifact.folder,
            "codec": codec,
            "tiers": [{"kind": "host", "capacity": "1MiB"}],
            "policy": {"tier_block_tokens": 32, "recent_window": 0, "minimum_tokens": 0, "decide": "always"},
            # Room for Triton's interpreter on a busy machine.
            "transfer": {"staging": "2MiB", "timeout": "10min"},
            "pipeline": {"onboard_timeout": "10min"},
        }
    )


def make_cache(device: torch.device) -> PagedKvCache:
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(2, 4, 16, 2, 16, generator=generator).to(device) for _ in range(3)]
    return PagedKvCache.from_layers(layers, "2BNHD")


async def test_the_configured_codec_serves_the_cache_on_its_device(tmp_path: Path, gpu: GpuDevice) -> None:
    cache = make_cache(gpu.device)
    before = cache.gather(range(4))
    blocks = SequenceBlocks([b"a", b"b", b"c", b"d"], range(4))
    settings = config(tmp_path, device="auto", gpu={"memory": "8MiB"})
    async with await open_adapter(settings, GEOMETRY, 16, device=gpu) as adapter:
        assert isinstance(adapter._onboarder._boundaries.of(cache), DeviceBoundary)
        result = await adapter.offload(blocks, cache).wait()
        assert result.stored == 2
        for layer in range(3):
            cache.keys[layer].fill_(float("nan"))
        await adapter.onboard(blocks, cache).wait()
    after = cache.gather(range(4))
    assert all(torch.isfinite(one).all() for one in after)
    assert not torch.equal(before[0], after[0])  # lossy: it went through the codec


async def test_the_cpu_serves_everything_if_it_is_told_to(tmp_path: Path, gpu: GpuDevice) -> None:
    async with await open_adapter(config(tmp_path, device="cpu"), GEOMETRY, 16, device=gpu) as adapter:
        assert isinstance(adapter._onboarder._boundaries.of(make_cache(gpu.device)), HostBoundary)


async def test_a_cache_in_host_memory_contradicts_a_codec_on_cuda(tmp_path: Path) -> None:
    for device in (None, torch.device("cpu")):
        with pytest.raises(ConfigError, match="lies in host memory: set it to auto or cpu"):
            await open_adapter(config(tmp_path, device="cuda"), GEOMETRY, 16, device=device)


async def test_too_little_staging_memory_is_refused_with_what_is_needed(
    tmp_path: Path, gpu: GpuDevice
) -> None:
    settings = config(tmp_path, gpu={"memory": "1MiB"})
    settings = settings.model_copy(
        update={"policy": settings.policy.model_copy(update={"tier_block_tokens": 8192})}
    )
    with pytest.raises(ConfigError, match="does not hold two tier blocks of 8192 tokens: set it to"):
        await open_adapter(settings, GEOMETRY, 16, device=gpu)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
async def test_without_a_usable_gpu_auto_says_why_and_cuda_refuses(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An engine cannot have a cache on CUDA here: only its word for it is made up."""
    claimed = torch.device("cuda", 0)
    with caplog.at_level(logging.WARNING, "dynamo_kvtc"):
        async with await open_adapter(config(tmp_path), GEOMETRY, 16, device=claimed):
            pass
    assert "the CPU encodes and decodes the GPU's cache, which is slow: no usable GPU" in caplog.text
    with pytest.raises(GpuUnavailableError, match="no usable GPU"):
        await open_adapter(config(tmp_path, device="cuda"), GEOMETRY, 16, device=claimed)
