"""The whole pipeline with the GPU's codec, on real tiers and real NIXL: what it stores, reads and refuses."""

from __future__ import annotations

import asyncio
import sys
import threading
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "pipeline"))

import rig as rigs
from rig import GEOMETRY, PARAMETERS, POLICY, Rig
from synthetic import make_block, make_parameters, make_rd_parameters

from dynamo_kvtc.codec.geometry import LayerRange
from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.gpu.gpu_codec import GpuCodec
from dynamo_kvtc.codec.header import Profile
from dynamo_kvtc.codec.mixed import MixedCodec
from dynamo_kvtc.codec.open import open_codec
from dynamo_kvtc.codec.parameters import AnyParameters
from dynamo_kvtc.codec.raw import RawCodec
from dynamo_kvtc.codec.transform_codec import TransformCodec
from dynamo_kvtc.errors import OnboardError
from dynamo_kvtc.pipeline.blocks import SequenceBlocks
from dynamo_kvtc.pipeline.boundary import Boundaries, DeviceBoundary, HostBoundary
from dynamo_kvtc.pipeline.encoders import Encoder, Encoders
from dynamo_kvtc.pipeline.onboard import OnboardSettings
from dynamo_kvtc.pipeline.paged import PagedKvCache
from dynamo_kvtc.pipeline.permuted import PermutedKvCache
from dynamo_kvtc.policy.guard import GuardSettings
from dynamo_kvtc.tiers.base import ReadRequest

#: Root-mean-square difference to the CPU's float32 products, of that of the values (`docs/bitstream.md`).
TOLERANCE = 0.01

STEP = POLICY.tier_block_tokens


def open_rig(folder: Path, *, units: int = 12, **options: Any) -> AbstractAsyncContextManager[Rig]:
    """Open a rig whose deadlines leave room for Triton's interpreter on a busy machine."""
    settings = OnboardSettings(timeout_s=600, units=units)
    return rigs.open_rig(folder, onboard=settings, store_timeout_s=600, **options)


def host_codec(parameters: AnyParameters = PARAMETERS) -> TransformCodec:
    ratio = next(iter(parameters.ratios.values()))
    return open_codec(parameters, ratio=ratio, compute_dtype="float32", threads=1)


def on_device(cache: PagedKvCache, gpu: GpuDevice) -> PagedKvCache:
    """Return the cache where the codec's kernels run."""
    return PagedKvCache(
        [one.to(gpu.device) for one in cache.keys], [one.to(gpu.device) for one in cache.values]
    )


def filled(cache: PagedKvCache, parameters: AnyParameters) -> PagedKvCache:
    """Fill a cache with KV as `parameters` were made for."""
    kv = make_block(parameters, cache.num_blocks * cache.block_size)
    for layer in range(GEOMETRY.num_layers):
        cache.scatter_layer(layer, range(cache.num_blocks), kv.keys[:, layer], kv.values[:, layer])
    return cache


def assert_close(actual: PagedKvCache, expected: PagedKvCache, blocks: SequenceBlocks) -> None:
    for a, e in zip(actual.gather(blocks.block_ids), expected.gather(blocks.block_ids), strict=True):
        a, e = a.cpu().double(), e.cpu().double()
        assert torch.isfinite(a).all()
        assert (a - e).pow(2).mean().sqrt() <= TOLERANCE * e.pow(2).mean().sqrt()


async def stored(rig: Rig, blocks: SequenceBlocks) -> list[bytes]:
    """Return a sequence's streams as they lie in the tiers."""
    streams = []
    for key in rig.adapter.keys(blocks.hashes):
        size = rig.adapter.tiers.size_of(key)
        assert size is not None
        async with rig.staging.lease(size, timeout_s=5) as span:
            await rig.adapter.tiers.get([ReadRequest(key, 0, span)], timeout_s=5)
            streams.append(bytes(span.view))
    return streams


@pytest.mark.parametrize("profile", ["kvtc", "rd"])
async def test_each_side_onboards_what_either_has_offloaded(
    tmp_path: Path, gpu: GpuDevice, profile: str
) -> None:
    parameters = PARAMETERS if profile == "kvtc" else make_rd_parameters(GEOMETRY, groups=2)
    host = host_codec(parameters)
    device = GpuCodec(host, gpu)
    results, streams = {}, {}
    for writer in ("host", "device"):
        folder = tmp_path / writer
        folder.mkdir()
        async with open_rig(
            folder, codec=host, device_codec=device if writer == "device" else None, num_blocks=16
        ) as rig:
            blocks = rig.sequence(3 * STEP)
            rig.source = filled(rig.source, parameters)
            rig.source = on_device(rig.source, gpu) if writer == "device" else rig.source
            await rig.store(blocks)
            streams[writer] = await stored(rig, blocks)
        # The disk tier survives: another adapter, with the other codec, reads what was stored.
        for reader in ("host", "device"):
            async with open_rig(
                folder,
                codec=host,
                device_codec=device if reader == "device" else None,
                tiers=("disk",),
                num_blocks=16,
            ) as rig:
                rig.destination = on_device(rig.destination, gpu) if reader == "device" else rig.destination
                assert await rig.adapter.lookup(blocks.hashes) == 3 * STEP
                await rig.adapter.onboard(blocks, rig.destination).wait()
                results[writer, reader] = rig.destination
    for writer in ("host", "device"):
        assert_close(results[writer, "device"], results[writer, "host"], blocks)
    for ours, theirs in zip(streams["device"], streams["host"], strict=True):
        a, b = host.read_header(ours), host.read_header(theirs)
        assert (a.plan_id, a.first_position, a.sink_tokens, a.binding) == (
            b.plan_id, b.first_position, b.sink_tokens, b.binding,
        )  # fmt: skip
        # Coefficients differ in the last bits (bfloat16 products against float32), and the CPU's coder has a
        # Huffman code for each run of symbols, which counts in streams as small as these.
        assert abs(len(ours) - len(theirs)) <= 0.05 * len(theirs)


async def test_every_layer_is_told_of_when_it_is_in_place(tmp_path: Path, gpu: GpuDevice) -> None:
    async with open_rig(
        tmp_path, units=4, codec=host_codec(), device_codec=GpuCodec(host_codec(), gpu)
    ) as rig:
        rig.source, rig.destination = on_device(rig.source, gpu), on_device(rig.destination, gpu)
        blocks = rig.sequence(4 * STEP)
        await rig.store(blocks)
        handle = rig.adapter.onboard(blocks, rig.destination)
        await handle.layer(0)
        await handle.wait()
        assert sorted(handle.timeline.layer_ready) == list(range(GEOMETRY.num_layers))
        opened = [one for one in handle.timeline.intervals if one.stage == "open"]
        # Two units of each of the two layer groups, each opened in one batch and launched before the next.
        assert len(opened) == 4
        projected = [one for one in handle.timeline.intervals if one.stage == "project"]
        assert len(projected) == len(opened)
        keys, _ = rig.destination.gather(blocks.block_ids)
        assert torch.isfinite(keys).all()


async def test_a_damaged_stream_ends_the_request_in_front_of_it(tmp_path: Path, gpu: GpuDevice) -> None:
    async with open_rig(tmp_path, codec=host_codec(), device_codec=GpuCodec(host_codec(), gpu)) as rig:
        rig.source, rig.destination = on_device(rig.source, gpu), on_device(rig.destination, gpu)
        blocks = rig.sequence(3 * STEP)
        await rig.store(blocks)
        key = rig.adapter.keys(blocks.hashes)[1]
        (_, second, _) = await stored(rig, blocks)
        header = rig.adapter.codec.read_header(second)
        damaged = bytearray(second)
        damaged[header.group_span(1)[0] + 3] ^= 0x10
        await rig.adapter.tiers.evict([key])
        async with rig.staging.lease(len(damaged), timeout_s=5) as span:
            span.view[:] = damaged
            assert await rig.adapter.tiers.put(key, span, timeout_s=5)
        handle = rig.adapter.onboard(blocks, rig.destination)
        with pytest.raises(OnboardError) as failed:
            await handle.wait()
        assert failed.value.tokens_to_recompute == ((STEP, 3 * STEP),)
        assert rig.adapter.tiers.size_of(key) is None
        # What lies in front of it is in place.
        sound = SequenceBlocks(blocks.hashes[: STEP // 8], blocks.block_ids[: STEP // 8])
        keys, values = rig.destination.gather(sound.block_ids)
        assert torch.isfinite(keys).all() and torch.isfinite(values).all()


async def test_a_block_that_cannot_be_encoded_drops_alone(tmp_path: Path, gpu: GpuDevice) -> None:
    async with open_rig(tmp_path, codec=host_codec(), device_codec=GpuCodec(host_codec(), gpu)) as rig:
        rig.source = on_device(rig.source, gpu)
        rig.source.keys[2][5] = float("nan")
        blocks = rig.sequence(3 * STEP)
        result = await rig.adapter.offload(blocks, rig.source).wait()
        assert (result.stored, result.dropped) == (2, 1)
        assert rig.adapter.status().counters.dropped_blocks["unencodable"] == 1


async def test_batches_and_units_fit_into_the_staging_memory(tmp_path: Path, gpu: GpuDevice) -> None:
    """With room for hardly more than one tier block, everything still comes through, one at a time."""
    host = host_codec()
    roomy = GpuCodec(host, gpu)
    tight = 2 * STEP * (roomy.budget.nbytes // 2 // roomy.most_encode_tokens + 1)
    device = GpuCodec(host, gpu, staging_bytes=tight)
    assert STEP <= device.most_encode_tokens < 2 * STEP
    async with open_rig(tmp_path, codec=host, device_codec=device) as rig:
        rig.source, rig.destination = on_device(rig.source, gpu), on_device(rig.destination, gpu)
        blocks = rig.sequence(3 * STEP)
        await rig.store(blocks)
        await rig.adapter.onboard(blocks, rig.destination).wait()
        keys, _ = rig.destination.gather(blocks.block_ids)
        assert torch.isfinite(keys).all()
    assert device.budget.taken == 0


async def test_raw_streams_beside_an_artifacts_are_copied_in(tmp_path: Path, gpu: GpuDevice) -> None:
    host = host_codec()
    raw = RawCodec(GEOMETRY, PARAMETERS.artifact_id, layer_groups=host.layer_groups)
    mixed = MixedCodec(host, raw)
    # The second of four tier blocks is stored raw, the others are encoded on the device.
    async with open_rig(tmp_path, codec=raw, num_blocks=32) as rig:
        whole = rig.sequence(4 * STEP)
        source = rig.source
        step = len(whole.hashes) // 4
        second = SequenceBlocks(
            whole.hashes[step : 2 * step], whole.block_ids[step : 2 * step], first_block=step
        )
        await rig.store(second)
    async with open_rig(
        tmp_path, codec=mixed, device_codec=GpuCodec(host, gpu), tiers=("disk",), num_blocks=32
    ) as rig:
        rig.source, rig.destination = on_device(source, gpu), on_device(rig.destination, gpu)
        result = await rig.adapter.offload(whole, rig.source).wait()
        assert (result.stored, result.already_stored) == (3, 1)
        profiles = [header.profile for header in await rig.adapter.headers(whole.hashes)]
        assert profiles == [Profile.KVTC, Profile.RAW, Profile.KVTC, Profile.KVTC]
        await rig.adapter.onboard(whole, rig.destination).wait()
        for got, given in zip(
            rig.destination.gather(second.block_ids), rig.source.gather(second.block_ids), strict=True
        ):
            assert torch.equal(got, given)
        keys, values = rig.destination.gather(whole.block_ids)
        assert torch.isfinite(keys).all() and torch.isfinite(values).all()


async def test_the_guard_checks_samples_and_takes_the_gentler_plan(tmp_path: Path, gpu: GpuDevice) -> None:
    parameters = make_parameters(GEOMETRY, groups=2, ratios=(8.0, 2.0))
    codecs = [open_codec(parameters, ratio=ratio, compute_dtype="float32", threads=1) for ratio in (8.0, 2.0)]
    plans = [Encoder(str(index), codec, expected_error=1e-9) for index, codec in enumerate(codecs)]
    encoders = Encoders(plans, guard=GuardSettings(1.0, 2.0, samples=1))
    async with open_rig(
        tmp_path, codec=codecs[0], device_codec=GpuCodec(codecs[0], gpu), encoders=encoders
    ) as rig:
        rig.source, rig.destination = on_device(rig.source, gpu), on_device(rig.destination, gpu)
        first, second = (rig.sequence(STEP, name=name) for name in "ab")
        await rig.store(first)
        assert rig.adapter.status().guard["state"] == "raised"
        await rig.store(second)
        plans = [(await rig.adapter.headers(one.hashes))[0].plan_id for one in (first, second)]
        assert [parameters.ratios[plan] for plan in plans] == [8.0, 2.0]
        for blocks in (first, second):
            await rig.adapter.onboard(blocks, rig.destination).wait()


async def test_work_is_ordered_behind_the_engines_as_it_was_when_blocks_were_handed_over(
    tmp_path: Path, gpu: GpuDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events stand for themselves here: only which of them the codec is given is looked at."""
    device = GpuCodec(host_codec(), gpu)
    seen: list[object] = []
    monkeypatch.setattr(gpu, "after_engine", seen.append)
    async with open_rig(tmp_path, codec=host_codec(), device_codec=device) as rig:
        rig.source, rig.destination = on_device(rig.source, gpu), on_device(rig.destination, gpu)
        blocks = rig.sequence(STEP)
        written, later, read = object(), object(), object()
        rig.source._fence = written  # type: ignore[assignment]
        ticket = rig.adapter.offload(blocks, rig.source)
        rig.source._fence = later  # type: ignore[assignment]
        await ticket.wait()
        assert seen == [written]
        rig.destination._fence = read  # type: ignore[assignment]
        handle = rig.adapter.onboard(blocks, rig.destination)
        rig.destination._fence = later  # type: ignore[assignment]
        await handle.wait()
        assert seen[1:] == [read] * (len(seen) - 1)
        assert len(seen) > 1


async def test_a_stream_waits_for_layers_that_are_only_launched(
    tmp_path: Path, gpu: GpuDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Completions that the test holds back stand for a device at work."""
    device = GpuCodec(host_codec(), gpu)
    done = threading.Event()
    ordered: list[tuple[int, object]] = []

    class Held:
        def __init__(self, layer: int) -> None:
            self.layer = layer

        def reached(self) -> bool:
            return done.is_set()

        def wait(self) -> None:
            assert done.wait(10)

        def order(self, stream: object) -> None:
            ordered.append((self.layer, stream))

    def scatter(parts: object, layers: LayerRange, *views: object, after: object) -> list[Held]:
        GpuCodec.scatter(device, parts, layers, *views, after=after)  # type: ignore[arg-type]
        return [Held(layer) for layer in range(layers.first, layers.stop)]

    monkeypatch.setattr(device, "scatter", scatter)
    async with open_rig(tmp_path, codec=host_codec(), device_codec=device) as rig:
        rig.source, rig.destination = on_device(rig.source, gpu), on_device(rig.destination, gpu)
        blocks = rig.sequence(2 * STEP)
        await rig.store(blocks)
        handle = rig.adapter.onboard(blocks, rig.destination)
        engine = object()
        for layer in range(GEOMETRY.num_layers):
            await asyncio.wait_for(handle.layer(layer, engine), 30)  # type: ignore[arg-type]
        assert ordered == [(layer, engine) for layer in range(GEOMETRY.num_layers)]
        assert not handle.done()
        assert not handle.timeline.layer_ready
        # Cancelled, it still waits until nothing is written any more.
        cancelling = asyncio.create_task(handle.cancel())
        await asyncio.sleep(0.05)
        assert not cancelling.done()
        done.set()
        await asyncio.wait_for(cancelling, 10)
        assert handle.done()


def test_a_cache_is_served_where_it_lies(gpu: GpuDevice) -> None:
    host = host_codec()
    device = GpuCodec(host, gpu)
    layers = [torch.zeros(2, 4, 8, 2, 16, dtype=torch.bfloat16, device=gpu.device) for _ in range(4)]
    cache = PagedKvCache.from_layers(layers, "2BNHD")
    assert isinstance(Boundaries(host, Encoders.single(host), device).of(cache), DeviceBoundary)
    assert isinstance(Boundaries(host, Encoders.single(host)).of(cache), HostBoundary)
    page = 2 * 8 * 2 * 16
    pages = [torch.zeros(4, page, dtype=torch.bfloat16, device=gpu.device) for _ in range(4)]
    places = torch.arange(page).view(2, 8, 2, 16)
    strided = PermutedKvCache(pages, places[0], places[1])
    assert isinstance(Boundaries(host, Encoders.single(host), device).of(strided), DeviceBoundary)
    shuffled = torch.randperm(page, generator=torch.Generator().manual_seed(0)).view(2, 8, 2, 16)
    odd = PermutedKvCache(pages, shuffled[0], shuffled[1])
    assert isinstance(Boundaries(host, Encoders.single(host), device).of(odd), HostBoundary)
