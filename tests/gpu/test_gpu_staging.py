"""The plan of device memory covers what batches allocate, and the budget gives back what ends."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from synthetic import make_block, make_parameters, make_rd_parameters

from dynamo_kvtc.codec.entropy import MAX_DEFLATE_CHUNK_BYTES
from dynamo_kvtc.codec.geometry import KvGeometry
from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.gpu.entropy_batch import BatchCoder, CodedBatch, Slots
from dynamo_kvtc.codec.gpu.gpu_codec import GpuCodec
from dynamo_kvtc.codec.gpu.staging import StagingBudget, encode_bytes, encode_bytes_per_token
from dynamo_kvtc.codec.open import open_codec
from dynamo_kvtc.codec.parameters import AnyParameters
from dynamo_kvtc.errors import ChunkChecksumError, LayoutError, TransferTimeoutError

GEOMETRY = KvGeometry(num_layers=4, num_kv_heads=2, head_size=16, dtype="bfloat16")


def make(profile: str) -> AnyParameters:
    if profile == "rd":
        return make_rd_parameters(GEOMETRY, groups=2)
    return make_parameters(GEOMETRY, groups=2, ratios=(4.0,))


def open_device(parameters: AnyParameters, gpu: GpuDevice, **options: int) -> GpuCodec:
    ratio = next(iter(parameters.ratios.values()))
    return GpuCodec(open_codec(parameters, ratio=ratio, threads=1), gpu, **options)


class Slotted(BatchCoder):
    """Plans for chunks as nvCOMP would: each takes the room of the largest."""

    coder_id = 1
    name = "slots"
    inflates = False
    slot = MAX_DEFLATE_CHUNK_BYTES + 4096

    def __init__(self, inner: BatchCoder) -> None:
        self.inner, self.chunks = inner, 0

    def encode_bytes(self, sizes: list[int]) -> int:  # type: ignore[override]
        return self.slot * len(sizes)

    def encode(self, plain: torch.Tensor, slots: Slots) -> CodedBatch:
        self.chunks = len(slots.sizes)
        return self.inner.encode(plain, slots)


@pytest.mark.parametrize("profile", ["kvtc", "rd"])
def test_the_coders_slots_are_planned_for(gpu: GpuDevice, profile: str) -> None:
    parameters = make(profile)
    codec = open_device(parameters, gpu)
    coder = codec._coder = Slotted(codec._coder)
    blocks = [make_block(parameters, tokens) for tokens in (24, 16)]
    planned = encode_bytes(parameters, codec.host.encoding_plan, [24, 16], coder.encode_bytes)
    codec.encode(blocks)
    assert coder.chunks > 0
    assert planned >= coder.slot * coder.chunks
    rest = encode_bytes(parameters, codec.host.encoding_plan, [24, 16], lambda sizes: 0)
    assert planned == rest + coder.encode_bytes([0] * coder.chunks)


@pytest.mark.parametrize("profile", ["kvtc", "rd"])
def test_a_token_of_a_short_block_takes_more(profile: str) -> None:
    parameters = make(profile)
    plan = next(iter(parameters.ratios))
    short, long = (encode_bytes_per_token(parameters, plan, block_tokens=tokens) for tokens in (8, 256))
    assert short > long > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("profile", ["kvtc", "rd"])
def test_what_the_allocator_hands_out_stays_within_the_plan(gpu: GpuDevice, profile: str) -> None:
    geometry = KvGeometry(num_layers=8, num_kv_heads=8, head_size=128, dtype="bfloat16")
    parameters = (
        make_rd_parameters(geometry, groups=2)
        if profile == "rd"
        else make_parameters(geometry, groups=2, ratios=(8.0,))
    )
    codec = open_device(parameters, gpu)
    codec.warm_up()
    blocks = [make_block(parameters, 256) for _ in range(4)]
    planned = encode_bytes(parameters, codec.host.encoding_plan, [256] * 4, codec._coder.encode_bytes)
    raw = 4 * 256 * geometry.token_bytes
    torch.cuda.reset_peak_memory_stats(gpu.device)
    before = torch.cuda.memory_allocated(gpu.device)
    codec.encode(blocks)
    # `encode` brings the blocks to the device first; allocations are rounded up to 512 bytes.
    assert torch.cuda.max_memory_allocated(gpu.device) - before - raw <= 1.05 * planned


def test_everything_is_given_back_also_after_damage(gpu: GpuDevice) -> None:
    parameters = make("rd")
    codec = open_device(parameters, gpu)
    (stream,) = codec.encode([make_block(parameters, 24)])
    header = codec.read_header(stream)
    start, stop = header.group_span(0)
    opened = codec.open_groups([header], 0, [stream[start:stop]])
    assert codec.budget.taken > 0
    del opened
    damaged = bytearray(stream[start:stop])
    damaged[0] ^= 1
    found = codec.open_groups([header], 0, [damaged])
    assert isinstance(found[0], ChunkChecksumError)
    gc.collect()
    assert codec.budget.taken == 0


def test_a_batch_beyond_the_budget_is_refused_and_one_that_waits_gets_its_turn() -> None:
    class Owner:
        pass

    budget = StagingBudget(100, timeout_s=0.05)
    first, second = Owner(), Owner()
    with pytest.raises(LayoutError, match=r"raise codec\.gpu\.memory"):
        budget.take(101, first)
    budget.take(80, first)
    with pytest.raises(TransferTimeoutError):
        budget.take(30, second)
    patient = StagingBudget(100, timeout_s=10)
    patient.take(80, first)
    waiting = threading.Thread(target=patient.take, args=(30, second))
    waiting.start()
    patient.shrink(first, 40)
    waiting.join(10)
    assert patient.taken == 70
    del first, second
    gc.collect()
    assert patient.taken == 0
    with pytest.raises(ValueError, match="no"), patient.taken_by(owner := Owner(), 50):
        assert patient.taken == 50
        raise ValueError("no")
    assert patient.taken == 0
    del owner
