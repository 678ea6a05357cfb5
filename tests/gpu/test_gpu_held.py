"""Promised chunks: held compressed, tried by the device, decoded there when a host loads them."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "pipeline"))

from layouts import make_cache
from rig import BLOCK_SIZE, GEOMETRY, POLICY
from synthetic import make_block, make_parameters, make_rd_parameters

from dynamo_kvtc.codec.bitstream import EncodedChunk, Section, read_section, write_stream
from dynamo_kvtc.codec.entropy import STORE
from dynamo_kvtc.codec.geometry import LayerRange
from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.gpu.gpu_codec import GpuCodec
from dynamo_kvtc.codec.header import SectionKind
from dynamo_kvtc.codec.open import open_codec
from dynamo_kvtc.codec.parameters import AnyParameters
from dynamo_kvtc.codec.transform_codec import TransformCodec
from dynamo_kvtc.errors import GpuUnavailableError, LayoutError
from dynamo_kvtc.pipeline.adapter import TierAdapter
from dynamo_kvtc.pipeline.chunk_store import Chunk, ChunkJob, ChunkStore, slot_blocks
from dynamo_kvtc.pipeline.load_buffer import DecodedBuffer, HeldBuffer, LoadBuffer, open_load_buffer
from dynamo_kvtc.pipeline.onboard import OnboardSettings
from dynamo_kvtc.pipeline.paged import PagedKvCache
from dynamo_kvtc.pipeline.threaded import ThreadedTierAdapter
from dynamo_kvtc.tiers.base import ReadRequest
from dynamo_kvtc.tiers.host import HostTier
from dynamo_kvtc.tiers.stack import TierStack
from dynamo_kvtc.transfer.agent import TransferAgent
from dynamo_kvtc.transfer.staging import StagingPool

TOLERANCE = 0.01
STEP = POLICY.tier_block_tokens
COUNT = STEP // BLOCK_SIZE
CHUNKS, BLOCKS = 3, 24
#: Room for what is held.
HELD_BYTES = 1 << 16


class Host:
    """An engine's side of native offloading: a cache, the tiers below it, the buffer of what is promised."""

    def __init__(self, codec: TransformCodec, device: GpuCodec | None, cache: PagedKvCache) -> None:
        async def open_adapter() -> TierAdapter:
            agent = await TransferAgent.create()
            staging = await StagingPool.create(agent, 4 << 20)
            tiers = TierStack([await HostTier.open(agent, 8 << 20)], staging=staging)
            return TierAdapter(
                codec,
                codec.parameters.artifact_id,
                agent,
                staging,
                tiers,
                POLICY,
                BLOCK_SIZE,
                onboard=OnboardSettings(timeout_s=600),
                store_timeout_s=600,
                device_codec=device,
            )

        self.codec, self.cache = codec, cache
        self.adapter = ThreadedTierAdapter(open_adapter, timeout_s=600)
        self.buffer: LoadBuffer = open_load_buffer(
            self.adapter, cache, HELD_BYTES, STEP * GEOMETRY.token_bytes
        )
        self.store = ChunkStore(self.adapter, cache, fill=self.buffer.fill)
        self._jobs = 0

    def write(self, first_slot: int = 0) -> list[Chunk]:
        """Fill the cache's first chunks with KV and store them."""
        kv = make_block(self.codec.parameters, CHUNKS * STEP)
        chunks = [Chunk(b"chunk %d" % index, index, first_slot + index) for index in range(CHUNKS)]
        blocks = slot_blocks(chunks, COUNT, b"")
        for layer in range(GEOMETRY.num_layers):
            self.cache.scatter_layer(layer, blocks.block_ids, kv.keys[:, layer], kv.values[:, layer])
        result = self.adapter.offload(blocks, self.cache).wait(600)
        assert result.dropped == 0
        return chunks

    def promise(self, chunks: Sequence[Chunk]) -> tuple[list[Chunk], list[bool]]:
        """Bring stored chunks into the buffer; return them with their slots, and which may be promised."""
        placed = []
        for chunk in chunks:
            nbytes = self.store.size_of(chunk.hash)
            assert nbytes is not None
            slot = self.buffer.reserve(nbytes)
            assert slot is not None
            placed.append(Chunk(chunk.hash, chunk.index, slot))
        self._jobs += 1
        self.store.submit(ChunkJob(self._jobs, placed, is_load=True))
        self.store.drain(600)
        (finished,) = self.store.take_finished()
        return placed, list(finished.done)

    def load(self, chunks: Sequence[Chunk], block_ids: Sequence[int]) -> int:
        return self.buffer.load([chunk.slot for chunk in chunks], block_ids).result(600)

    def reference(self, chunk: Chunk) -> tuple[torch.Tensor, torch.Tensor]:
        """What the CPU's codec makes of a stored chunk."""
        block = self.codec.decode(bytes(self.stored(chunk)))
        return block.keys, block.values

    def stored(self, chunk: Chunk) -> bytearray:
        async def read(adapter: TierAdapter) -> bytearray:
            key = adapter.namespace().key(chunk.hash)
            size = adapter.tiers.size_of(key)
            assert size is not None
            async with adapter._staging.lease(size, timeout_s=5) as span:
                await adapter.tiers.get([ReadRequest(key, 0, span)], timeout_s=5)
                return bytearray(span.view)

        return self.adapter.run(read)

    def replace(self, chunk: Chunk, stream: bytes) -> None:
        async def write(adapter: TierAdapter) -> None:
            key = adapter.namespace().key(chunk.hash)
            await adapter.tiers.evict([key])
            async with adapter._staging.lease(len(stream), timeout_s=5) as span:
                span.view[:] = stream
                assert await adapter.tiers.put(key, span, timeout_s=5)

        self.adapter.run(write)

    def assert_in_place(self, chunk: Chunk, block_ids: Sequence[int]) -> None:
        """Compare all of a chunk's blocks that are not -1 with the CPU's."""
        wanted = [index for index, block in enumerate(block_ids) if block >= 0]
        found = self.cache.gather([block_ids[index] for index in wanted])
        for actual, expected in zip(found, self.reference(chunk), strict=True):
            runs = expected.unflatten(0, (COUNT, BLOCK_SIZE))[wanted].flatten(0, 1).double()
            actual = actual.cpu().double()
            assert (actual - runs).pow(2).mean().sqrt() <= TOLERANCE * runs.pow(2).mean().sqrt()

    def close(self) -> None:
        self.buffer.close()
        self.store.close()


def host_codec(profile: str = "rd") -> TransformCodec:
    if profile == "rd":
        parameters: AnyParameters = make_rd_parameters(GEOMETRY, groups=2)
    else:
        parameters = make_parameters(GEOMETRY, groups=2, ratios=(4.0,))
    ratio = next(iter(parameters.ratios.values()))
    return open_codec(parameters, ratio=ratio, compute_dtype="float32", threads=1)


@contextmanager
def open_host(
    gpu: GpuDevice, *, profile: str = "rd", layout: str = "2BNHD", on_device: bool = True, **options: int
) -> Iterator[tuple[Host, GpuCodec]]:
    codec = host_codec(profile)
    device = GpuCodec(codec, gpu, **options)
    g = GEOMETRY
    cache = make_cache(
        layout, g.num_layers, BLOCKS, BLOCK_SIZE, g.num_kv_heads, g.head_size, torch.bfloat16, gpu.device
    )
    host = Host(codec, device if on_device else None, cache)
    try:
        yield host, device
        # Whatever has happened: nothing of the device's memory, the held memory and the staging is taken.
        host.buffer.clear()
        if isinstance(host.buffer, HeldBuffer):
            assert host.buffer._held.taken_bytes == 0
        # The last offload's batch goes with the task that has stored it, staging memory with the last read.
        staging, deadline = host.adapter._adapter._staging, time.monotonic() + 30
        while (device.budget.taken or staging.leased_bytes) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert device.budget.taken == 0
        assert staging.leased_bytes == 0
    finally:
        host.close()


@pytest.mark.parametrize(("profile", "layout"), [("rd", "BHN2D"), ("kvtc", "B2HND")])
def test_promised_chunks_are_decoded_on_the_device_when_they_are_loaded(
    gpu: GpuDevice, profile: str, layout: str
) -> None:
    with open_host(gpu, profile=profile, layout=layout) as (host, _):
        chunks, done = host.promise(host.write())
        assert done == [True] * CHUNKS
        # The engine has the first block already, and wants no more than the first half of the last chunk.
        target = list(range(BLOCKS - CHUNKS * COUNT, BLOCKS))
        half = COUNT // 2
        block_ids = [-1, *target[1:-half], *[-1] * half]
        kv_bytes = (len(target) - 1 - half) * BLOCK_SIZE * GEOMETRY.token_bytes
        assert host.load(chunks, block_ids) == kv_bytes
        for index, chunk in enumerate(chunks):
            host.assert_in_place(chunk, block_ids[index * COUNT : (index + 1) * COUNT])
        for block in (target[0], *target[-half:]):
            keys, values = host.cache.gather([block])
            assert keys.isnan().all() and values.isnan().all()
        # They stay where they are, to be loaded again, in another order as well.
        assert host.load([chunks[2], chunks[0]], target[: 2 * COUNT])
        host.assert_in_place(chunks[2], target[:COUNT])
        host.assert_in_place(chunks[0], target[COUNT : 2 * COUNT])


def test_the_measured_decode_speed_counts_trial_and_product(
    gpu: GpuDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_host(gpu) as (host, device):
        opens, scatters, pause_s = 0, 0, 0.1

        def open_groups(*args: Any) -> Any:
            nonlocal opens
            opens += 1
            time.sleep(pause_s)
            return GpuCodec.open_groups(device, *args)

        def scatter(*args: Any, **options: Any) -> Any:
            nonlocal scatters
            scatters += 1
            time.sleep(pause_s)
            return GpuCodec.scatter(device, *args, **options)

        monkeypatch.setattr(device, "open_groups", open_groups)
        monkeypatch.setattr(device, "scatter", scatter)
        adapter = host.adapter._adapter
        speeds = adapter.costs.speeds
        chunks, done = host.promise(host.write())
        assert all(done) and opens
        assert speeds.decode is None  # nothing is in place yet
        tried, target = opens, list(range(BLOCKS - CHUNKS * COUNT, BLOCKS))
        host.load(chunks, target)
        first = speeds.decode
        assert first is not None and first == speeds.decode_speed(adapter.encoders.current.name)
        assert first <= CHUNKS * STEP / (pause_s * (opens + scatters))
        # What is loaded again has not been tried again.
        before = opens + scatters
        start = time.perf_counter()
        host.load(chunks, target)
        again_s = time.perf_counter() - start
        assert tried and speeds.decode is not None
        mean_s = CHUNKS * STEP / speeds.decode
        assert pause_s * (opens + scatters - before) <= 2 * mean_s - CHUNKS * STEP / first <= again_s + 0.01


def test_batches_fit_into_the_devices_memory(gpu: GpuDevice) -> None:
    roomy = GpuCodec(host_codec(), gpu)
    tight = 2 * STEP * (roomy.budget.nbytes // 2 // roomy.most_open_tokens + 1)
    encode = 2 * STEP * (roomy.budget.nbytes // 2 // roomy.most_encode_tokens + 1)
    with open_host(gpu, staging_bytes=max(tight, encode)) as (host, device):
        chunks, done = host.promise(host.write())
        assert all(done)
        assert device.most_open_tokens < CHUNKS * STEP
        target = list(range(BLOCKS - CHUNKS * COUNT, BLOCKS))
        host.load(chunks, target)
        for index, chunk in enumerate(chunks):
            host.assert_in_place(chunk, target[index * COUNT : (index + 1) * COUNT])


def test_what_only_the_payload_shows_is_found_before_a_chunk_is_promised(gpu: GpuDevice) -> None:
    """Every checksum of this stream holds; its last byte of values is none that an encoder writes."""
    with open_host(gpu) as (host, _):
        chunks = host.write()
        stream = bytes(host.stored(chunks[1]))
        header = host.codec.read_header(stream)
        sections = []
        for group, layers in enumerate(header.layer_groups):
            payload = stream[slice(*header.group_span(group))]
            for kind in (SectionKind.KEYS, SectionKind.VALUES, SectionKind.SINKS):
                plain = read_section(header, group, kind, payload)
                if not len(plain):
                    continue
                if (group, kind) == (1, SectionKind.VALUES):
                    plain[-1] = 0xFF
                runs, start = [], 0
                for chunk in header.chunks_of(group, kind):
                    runs.append(
                        EncodedChunk(STORE, chunk.plain_size, plain[start : start + chunk.plain_size])
                    )
                    start += chunk.plain_size
                sections.append(Section(layers, kind, runs))
        host.replace(chunks[1], write_stream(header, sections))
        placed, done = host.promise(chunks)
        assert done == [True, False, False]
        # It is gone, so that it is stored again; what failed gives its room back.
        assert host.store.size_of(chunks[1].hash) is None
        with pytest.raises(LayoutError, match="no whole stream"):
            host.buffer.load([placed[2].slot], range(COUNT))
        for chunk in placed[1:]:
            host.buffer.release(chunk.slot)
        host.load(placed[:1], range(COUNT))
        host.assert_in_place(placed[0], range(COUNT))


def test_another_object_that_is_too_large_for_its_slot_is_not_promised(gpu: GpuDevice) -> None:
    with open_host(gpu) as (host, _):
        chunks = host.write()
        slot = host.buffer.reserve(64)
        assert slot is not None
        host.store.submit(ChunkJob(1, [Chunk(chunks[0].hash, 0, slot)], is_load=True))
        host.store.drain(600)
        (finished,) = host.store.take_finished()
        assert finished.done == (False,)


@pytest.mark.parametrize("where", ["open_groups", "scatter"])
def test_the_cpu_keeps_the_promise_where_the_device_cannot(
    gpu: GpuDevice, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    with open_host(gpu) as (host, device):
        chunks, done = host.promise(host.write())
        assert all(done)
        calls = []

        def fail(*args: object, **kwargs: object) -> None:
            calls.append(where)
            raise GpuUnavailableError("no memory is left")

        monkeypatch.setattr(device, where, fail)
        target = list(range(BLOCKS - CHUNKS * COUNT, BLOCKS))
        host.load(chunks, target)
        assert calls == [where]
        for index, chunk in enumerate(chunks):
            host.assert_in_place(chunk, target[index * COUNT : (index + 1) * COUNT])


def test_a_device_that_fails_the_trial_promises_nothing(
    gpu: GpuDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_host(gpu) as (host, device):
        chunks = host.write()

        def fail(*args: object) -> None:
            raise GpuUnavailableError("it does not answer")

        monkeypatch.setattr(device, "open_groups", fail)
        placed, done = host.promise(chunks)
        assert done == [False] * CHUNKS
        # The objects are sound, and stay.
        assert all(host.store.size_of(chunk.hash) is not None for chunk in chunks)
        for chunk in placed:
            host.buffer.release(chunk.slot)


def test_a_slot_is_not_used_again_while_the_device_reads_it(
    gpu: GpuDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A completion that the test holds back stands for a device at work: an abort gives the slots back."""
    with open_host(gpu) as (host, device):
        assert isinstance(host.buffer, HeldBuffer)
        chunks, _ = host.promise(host.write())
        taken = host.buffer._held.taken_bytes
        done, launched = threading.Event(), threading.Event()

        class Held:
            def reached(self) -> bool:
                return done.is_set()

            def wait(self) -> None:
                launched.set()
                assert done.wait(60)

        def scatter(parts: object, layers: LayerRange, *views: object, after: object) -> list[Held]:
            GpuCodec.scatter(device, parts, layers, *views, after=after)  # type: ignore[arg-type]
            return [Held()] * layers.count

        monkeypatch.setattr(device, "scatter", scatter)
        target = list(range(BLOCKS - CHUNKS * COUNT, BLOCKS))
        load = host.buffer.load([chunk.slot for chunk in chunks], target)
        assert launched.wait(60)
        host.buffer.clear()
        assert host.buffer._held.taken_bytes == taken
        assert not load.done()
        done.set()
        load.result(60)
        assert host.buffer._held.taken_bytes == 0
        for index, chunk in enumerate(chunks):
            host.assert_in_place(chunk, target[index * COUNT : (index + 1) * COUNT])


def test_loads_are_ordered_behind_the_fence_of_when_they_began(
    gpu: GpuDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events stand for themselves here: only which of them the codec is given is looked at."""
    with open_host(gpu) as (host, _):
        chunks, _done = host.promise(host.write())
        seen: list[object] = []
        monkeypatch.setattr(gpu, "after_engine", seen.append)
        read, later = object(), object()
        host.cache._fence = read  # type: ignore[assignment]
        load = host.buffer.load([chunks[0].slot], range(COUNT))
        host.cache._fence = later  # type: ignore[assignment]
        load.result(600)
        host.cache._fence = None
        assert set(seen) == {read}


def test_the_room_bounds_what_is_promised(gpu: GpuDevice) -> None:
    with open_host(gpu) as (host, _):
        slots: list[int] = []
        while (slot := host.buffer.reserve(10_000)) is not None:
            slots.append(slot)
        assert len(slots) == HELD_BYTES // 10_048
        host.buffer.release(slots[2])
        assert host.buffer.reserve(10_001) is not None
        assert host.buffer.reserve(10_000) is None
        # Nothing need be forgotten for what would not fit into all of it.
        assert host.buffer.could_hold(HELD_BYTES) and not host.buffer.could_hold(HELD_BYTES + 1)


def test_where_the_cpu_decodes_chunks_wait_decoded(gpu: GpuDevice) -> None:
    with open_host(gpu, on_device=False) as (host, _):
        assert isinstance(host.buffer, DecodedBuffer)
        chunks, done = host.promise(host.write())
        assert all(done)
        target = list(range(BLOCKS - CHUNKS * COUNT, BLOCKS))
        host.load(chunks, [-1, *target[1:]])
        host.assert_in_place(chunks[0], [-1, *target[1:COUNT]])
        host.assert_in_place(chunks[2], target[2 * COUNT :])
        # Its slots are as large as decoded chunks.
        left = HELD_BYTES // (STEP * GEOMETRY.token_bytes) - CHUNKS
        slots = [host.buffer.reserve(1) for _ in range(left + 1)]
        assert None not in slots[:left] and slots[left] is None
