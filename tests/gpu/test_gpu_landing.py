"""Onboards whose stored bytes go from the disk tier's files straight into device memory.

The tiers, their files and NIXL's transfers are real. A tensor on the CPU is the device's memory, which NIXL's
POSIX backend fills: only NIXL's memory of GPUs and cuFile are not there, and not tested.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "pipeline"))

import rig as rigs
from rig import GEOMETRY, PARAMETERS, POLICY, Rig

from dynamo_kvtc.codec.entropy import RansCoder
from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.gpu.gpu_codec import GpuCodec
from dynamo_kvtc.codec.gpu.kernels.xxh3 import SHORTEST
from dynamo_kvtc.codec.mixed import MixedCodec
from dynamo_kvtc.codec.open import open_codec
from dynamo_kvtc.codec.raw import RawCodec
from dynamo_kvtc.codec.transform_codec import TransformCodec
from dynamo_kvtc.config import Config
from dynamo_kvtc.errors import OnboardError, TransferError
from dynamo_kvtc.pipeline.blocks import SequenceBlocks
from dynamo_kvtc.pipeline.device_staging import landing_bytes, open_device_staging
from dynamo_kvtc.pipeline.onboard import OnboardSettings
from dynamo_kvtc.pipeline.paged import PagedKvCache
from dynamo_kvtc.tiers.base import ReadRequest, Tier
from dynamo_kvtc.tiers.breaker_tier import BreakerTier
from dynamo_kvtc.tiers.disk_format import segment_files
from dynamo_kvtc.tiers.wrapper import TierWrapper
from dynamo_kvtc.transfer.agent import TransferAgent
from dynamo_kvtc.transfer.device_memory import DeviceRegion, tensor_of

STEP = POLICY.tier_block_tokens
BLOCKS = STEP // rigs.BLOCK_SIZE

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="a GPU's memory is filled by GPUDirect Storage, which is not set up here",
)


def make_host() -> TransformCodec:
    ratio = next(iter(PARAMETERS.ratios.values()))
    return open_codec(PARAMETERS, ratio=ratio, compute_dtype="float32", threads=1, coder=RansCoder())


@pytest.fixture(scope="module")
def device(gpu: GpuDevice) -> GpuCodec:
    return GpuCodec(make_host(), gpu)


def open_rig(
    folder: Path, device: GpuCodec, *, units: int = 12, device_bytes: int = 1 << 20, **options: Any
) -> AbstractAsyncContextManager[Rig]:
    """Open a rig with device memory to land in, and deadlines for Triton's interpreter on a busy machine."""
    options = {"codec": device.host, "num_blocks": 32, **options}
    settings = OnboardSettings(timeout_s=600, units=units)
    return rigs.open_rig(
        folder,
        device_codec=device,
        device_bytes=device_bytes,
        onboard=settings,
        store_timeout_s=600,
        **options,
    )


async def onboarded(rig: Rig, blocks: SequenceBlocks) -> tuple[torch.Tensor, torch.Tensor]:
    """Onboard a sequence; nothing stays leased."""
    await rig.adapter.onboard(blocks, rig.destination).wait()
    assert rig.device_staging is None or rig.device_staging.leased_bytes == 0
    return rig.destination.gather(blocks.block_ids)


def group_bytes(device: GpuCodec, headers: Sequence[Any]) -> int:
    spans = [header.group_span(group) for header in headers for group in range(len(device.layer_groups))]
    return sum(stop - start for start, stop in spans)


async def test_it_is_the_onboard_over_the_host_bit_for_bit(tmp_path: Path, device: GpuCodec) -> None:
    found = []
    for device_bytes in (1 << 20, 0):
        async with open_rig(tmp_path, device, tiers=("disk",), device_bytes=device_bytes) as rig:
            blocks = rig.sequence(3 * STEP)
            await rig.adapter.offload(blocks, rig.source).wait()
            found.append(await onboarded(rig, blocks))
            if rig.device_staging is not None:
                # All of it but headers.
                headers = await rig.adapter.headers(blocks.hashes)
                assert rig.device_staging.landed_bytes == group_bytes(device, headers)
                assert max(one.stored_size for header in headers for one in header.chunks) >= SHORTEST
    for landed, over_host in zip(*found, strict=True):
        assert torch.isfinite(landed).all()
        assert torch.equal(landed, over_host)


async def test_a_flipped_byte_in_a_file_is_a_miss_in_front_of_the_block(
    tmp_path: Path, device: GpuCodec
) -> None:
    async with open_rig(tmp_path, device, tiers=("disk",)) as rig:
        blocks = rig.sequence(3 * STEP)
        await rig.store(blocks)
        header = (await rig.adapter.headers(blocks.hashes))[1]
        key = rig.adapter.keys(blocks.hashes)[1]
        size = rig.adapter.tiers.size_of(key)
        assert size is not None
        async with rig.staging.lease(size, timeout_s=5) as span:
            await rig.adapter.tiers.get([ReadRequest(key, 0, span)], timeout_s=5)
            stream = bytes(span.view)
        ((_, segment),) = segment_files(tmp_path / "disk")
        with segment.open("r+b") as file:
            at = file.read().index(stream) + max(header.chunks_of(1), key=lambda one: one.stored_size).offset
            file.seek(at + 5)
            byte = file.read(1)[0]
            file.seek(at + 5)
            file.write(bytes([byte ^ 0x10]))
        handle = rig.adapter.onboard(blocks, rig.destination)
        with pytest.raises(OnboardError) as failed:
            await handle.wait()
        assert failed.value.tokens_to_recompute == ((STEP, 3 * STEP),)
        assert rig.adapter.tiers.size_of(key) is None
        assert rig.device_staging is not None
        assert rig.device_staging.landed_bytes > 0 == rig.device_staging.leased_bytes
        keys, values = rig.destination.gather(blocks.block_ids[:BLOCKS])
        assert torch.isfinite(keys).all() and torch.isfinite(values).all()


async def test_units_with_blocks_in_host_memory_go_over_the_host(tmp_path: Path, device: GpuCodec) -> None:
    async with open_rig(tmp_path, device, units=8) as rig:
        rig.adapter.tiers._max_promotions = 0
        blocks = rig.sequence(4 * STEP)
        await rig.store(blocks)
        expected = await onboarded(rig, blocks)
        assert rig.device_staging is not None
        assert rig.device_staging.landed_bytes == 0
        # Two of the four are on disk alone.
        keys = rig.adapter.keys(blocks.hashes)
        assert await rig.adapter.tiers.tiers[0].evict(keys[1:3]) == 2
        rig.destination = rigs.make_cache(32, filled=False)
        for actual, wanted in zip(await onboarded(rig, blocks), expected, strict=True):
            assert torch.equal(actual, wanted)
        headers = await rig.adapter.headers(blocks.hashes)
        assert rig.device_staging.landed_bytes == group_bytes(device, headers[1:3])


async def test_a_tier_that_cannot_is_passed_over(tmp_path: Path, device: GpuCodec) -> None:
    """As when an object came into host memory after it was looked for."""
    async with open_rig(tmp_path, device) as rig:
        blocks = rig.sequence(STEP)
        await rig.store(blocks)
        (key,), (header,) = rig.adapter.keys(blocks.hashes), await rig.adapter.headers(blocks.hashes)
        region = DeviceRegion(torch.zeros(1 << 16, dtype=torch.uint8))
        await rig.agent.register_memory(region)
        host, disk = rig.adapter.tiers.tiers
        into = region.span(0, 64)
        await rig.adapter.tiers.get([ReadRequest(key, header.group_span(0)[0], into)], timeout_s=5)
        assert tensor_of(into).any()
        # An object read whole is not verified by the tier, which cannot see it.
        size = disk.size_of(key)
        assert size is not None
        await disk.get([ReadRequest(key, 0, region.span(0, size))], timeout_s=5)
        await disk.evict([key])
        assert host.size_of(key) is not None
        with pytest.raises(TransferError, match="does not read into a device's memory"):
            await rig.adapter.tiers.get([ReadRequest(key, 0, into)], timeout_s=5)


async def test_without_room_units_go_over_the_host(tmp_path: Path, device: GpuCodec) -> None:
    async with open_rig(tmp_path, device, tiers=("disk",), device_bytes=4096, units=2) as rig:
        blocks = rig.sequence(4 * STEP)
        await rig.store(blocks)
        (keys, values), staging = await onboarded(rig, blocks), rig.device_staging
        assert torch.isfinite(keys).all() and torch.isfinite(values).all()
        headers = await rig.adapter.headers(blocks.hashes)
        assert staging is not None
        assert staging.landed_bytes < group_bytes(device, headers)


class _NotIntoDevices(TierWrapper):
    """A tier that says it reads into a device and does not: as where cuFile fails."""

    async def get(self, reads: Sequence[ReadRequest], *, timeout_s: float) -> None:
        if any(read.into.region.on_device for read in reads):
            raise TransferError("GDS read of 1 ranges failed: NIXL reports ERR")
        await super().get(reads, timeout_s=timeout_s)


async def test_what_cannot_be_read_into_the_device_is_read_over_the_host(
    tmp_path: Path, device: GpuCodec
) -> None:
    def wrap(tier: Tier, name: str) -> Tier:
        return _NotIntoDevices(tier) if name == "disk" else tier

    async with open_rig(tmp_path, device, tiers=("disk",), wrap=wrap) as rig:
        blocks = rig.sequence(2 * STEP)
        await rig.store(blocks)
        keys, values = await onboarded(rig, blocks)
        assert torch.isfinite(keys).all() and torch.isfinite(values).all()
        assert rig.device_staging is not None
        assert rig.device_staging.landed_bytes == 0


class _Held(TierWrapper):
    """A tier whose reads into a device wait for ever."""

    def __init__(self, inner: Tier) -> None:
        super().__init__(inner)
        self.reading = asyncio.Event()

    async def get(self, reads: Sequence[ReadRequest], *, timeout_s: float) -> None:
        if any(read.into.region.on_device for read in reads):
            self.reading.set()
            await asyncio.Event().wait()
        await super().get(reads, timeout_s=timeout_s)


async def test_a_cancelled_onboard_gives_its_memory_back(tmp_path: Path, device: GpuCodec) -> None:
    held: list[_Held] = []

    def wrap(tier: Tier, name: str) -> Tier:
        held.append(_Held(tier))
        return held[-1]

    async with open_rig(tmp_path, device, tiers=("disk",), wrap=wrap) as rig:
        blocks = rig.sequence(2 * STEP)
        await rig.store(blocks)
        handle = rig.adapter.onboard(blocks, rig.destination)
        await asyncio.wait_for(held[0].reading.wait(), 60)
        assert rig.device_staging is not None
        assert rig.device_staging.leased_bytes > 0
        await handle.cancel()
        assert rig.device_staging.leased_bytes == 0


async def test_raw_streams_go_over_the_host(tmp_path: Path, device: GpuCodec) -> None:
    raw = RawCodec(GEOMETRY, PARAMETERS.artifact_id, layer_groups=device.host.layer_groups)
    async with open_rig(tmp_path, device, codec=raw, tiers=("disk",), device_bytes=0) as rig:
        blocks, source = rig.sequence(2 * STEP), rig.source
        rig.adapter.boundaries._device = None
        await rig.store(blocks)
    async with open_rig(tmp_path, device, codec=MixedCodec(device.host, raw), tiers=("disk",)) as rig:
        for got, given in zip(await onboarded(rig, blocks), source.gather(blocks.block_ids), strict=True):
            assert torch.equal(got, given)
        assert rig.device_staging is not None
        assert rig.device_staging.landed_bytes == 0


async def test_a_cache_in_host_memory_is_served_over_the_host(tmp_path: Path, device: GpuCodec) -> None:
    async with open_rig(tmp_path, device, tiers=("disk",)) as rig:
        blocks = rig.sequence(STEP)
        await rig.store(blocks)
        elsewhere: PagedKvCache = rigs.make_cache(32, filled=False)
        await rig.adapter.onboard(blocks, elsewhere, boundary=rig.adapter.boundaries.host).wait()
        assert rig.device_staging is not None
        assert rig.device_staging.landed_bytes == 0
        assert torch.isfinite(elsewhere.gather(blocks.block_ids)[0]).all()


def config_of(tmp_path: Path, *, gds: bool = True, encrypted: bool = False) -> Config:
    (tmp_path / "key").write_bytes(bytes(32))
    disk: dict[str, Any] = {"kind": "disk", "path": str(tmp_path / "disk"), "capacity": "64MiB"}
    if encrypted:
        disk["encryption"] = {"keys": [{"id": "a", "file": str(tmp_path / "key")}]}
    return Config.model_validate(
        {
            "tiers": [{"kind": "host", "capacity": "8MiB"}, disk],
            "transfer": {"gds": gds},
            "artifact": str(tmp_path),
            "codec": {"gpu": {"memory": "8MiB"}},
        }
    )


async def test_device_memory_is_taken_where_it_is_of_use(tmp_path: Path, device: GpuCodec) -> None:
    """The agent is one without GPUDirect Storage, which cannot be here."""
    assert landing_bytes(config_of(tmp_path)) == 2 << 20
    assert landing_bytes(config_of(tmp_path, gds=False)) == 0
    assert landing_bytes(config_of(tmp_path, encrypted=True)) == 0
    async with open_rig(tmp_path, device, device_bytes=0) as rig:
        agent, tiers = rig.agent, rig.adapter.tiers

        async def opened(config: Config, codec: GpuCodec | None) -> bool:
            return await open_device_staging(config, agent, codec, tiers) is not None

        assert await opened(config_of(tmp_path), device)
        assert not await opened(config_of(tmp_path), None)
        assert not await opened(config_of(tmp_path, gds=False), device)
        # Where the host inflates, stored bytes are of no use on the device.
        assert not await opened(config_of(tmp_path), GpuCodec(deflate_host(), device._gpu))
        broken = TransferAgent.__new__(TransferAgent)
        broken.__dict__.update(agent.__dict__, _closed=True)
        assert await open_device_staging(config_of(tmp_path), broken, device, tiers) is None
        assert [BreakerTier(tier, rig.staging).reads_into_device for tier in tiers.tiers] == [False, True]


def deflate_host() -> TransformCodec:
    return open_codec(PARAMETERS, ratio=next(iter(PARAMETERS.ratios.values())), threads=1)
