"""rANS on the device: the CPU's bytes from the same segments, its verdict on damage, and no byte beyond."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynamo_kvtc.codec import rans_reference
from dynamo_kvtc.codec.entropy import RansCoder
from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.gpu.entropy_batch import Slots, place
from dynamo_kvtc.codec.gpu.kernels.rans_write_table import write_tables
from dynamo_kvtc.codec.gpu.rans_batch import RansBatchCoder, segments_of
from dynamo_kvtc.codec.rans_tables import choose_levels, frequencies_of, pack_table
from dynamo_kvtc.errors import EntropyDecodeError

CPU = RansCoder()
GUARD = 0xAA


@pytest.fixture(scope="module")
def coder(gpu: GpuDevice) -> RansBatchCoder:
    return RansBatchCoder(gpu)


def laplace(size: int, width: float, seed: int = 0) -> bytes:
    drawn = np.random.default_rng(seed).laplace(0, width, size)
    return np.rint(drawn).astype(np.int64).astype(np.uint8).tobytes()


def noise(size: int) -> bytes:
    return np.random.default_rng(1).integers(0, 256, size, dtype=np.uint8).tobytes()


#: Chunks with their runs: short ones, idle lanes, one symbol, every symbol, no gain, several segments.
CHUNKS: list[tuple[bytes, ...]] = [
    (b"\0",),
    (laplace(31, 3.0),),
    (laplace(32, 3.0),),
    (laplace(33, 0.3),),
    (laplace(700, 2.0),),
    (bytes(900),),
    (bytes(range(256)) * 3 + bytes(500),),
    (noise(500),),
    (b"\xff" * 640 + b"\0",),
    (laplace(2050, 0.5), laplace(2060, 20.0), bytes(1000), laplace(1010, 2.0)),
]


def on_device(gpu: GpuDevice, chunks: list[bytes]) -> tuple[torch.Tensor, Slots]:
    slots = place([len(chunk) for chunk in chunks])
    host = torch.full((slots.total,), GUARD, dtype=torch.uint8)
    for chunk, at in zip(chunks, slots.offsets, strict=True):
        host[at : at + len(chunk)] = torch.frombuffer(bytearray(chunk), dtype=torch.uint8)
    return gpu.upload(host), slots


def decoded_by(
    coder: RansBatchCoder, gpu: GpuDevice, coded: list[bytes], sizes: list[int]
) -> list[bytes] | None:
    """What the device makes of chunks; None if it refuses one. Only their own bytes may be written."""
    gap = 5
    starts = tuple(int(at) for at in np.cumsum([0, *(size + gap for size in sizes)])[:-1])
    target = Slots(starts, tuple(sizes), sum(sizes) + gap * len(sizes))
    with gpu.active():
        data, source = on_device(gpu, coded)
        plain = torch.full((target.total,), GUARD, dtype=torch.uint8, device=gpu.device)
        check = coder.decode(data, source, plain, target)
        host = gpu.download(plain).numpy().tobytes()
        for at, size in zip(starts, sizes, strict=True):
            assert host[at + size : at + size + gap] == bytes([GUARD]) * gap
        try:
            check()
        except EntropyDecodeError:
            return None
    return [host[at : at + size] for at, size in zip(starts, sizes, strict=True)]


def expected_chunk(runs: tuple[bytes, ...]) -> bytes:
    """What the CPU's reference makes of a chunk with the device's segments."""
    plain = b"".join(runs)
    steps = segments_of(len(plain), [len(run) for run in runs])
    parts = np.split(np.frombuffer(plain, np.uint8), np.cumsum(steps)[:-1] * 32)
    counts = [np.bincount(part, minlength=256) for part in parts]
    levels = [choose_levels(each).tolist() for each in counts]
    return rans_reference.encode(plain, list(zip(steps, levels, strict=True)))


def test_the_device_makes_the_chunks_of_the_cpu(gpu: GpuDevice, coder: RansBatchCoder) -> None:
    plains = [b"".join(runs) for runs in CHUNKS]
    with gpu.active():
        plain, slots = on_device(gpu, plains)
        slots = Slots(slots.offsets, slots.sizes, slots.total, tuple(tuple(map(len, r)) for r in CHUNKS))
        batch = coder.encode(plain, slots)
    host = gpu.download(batch.data).numpy().tobytes()
    shrunk = 0
    for runs, data, at, size in zip(CHUNKS, plains, batch.offsets, batch.sizes, strict=True):
        wanted = expected_chunk(runs)
        assert size == len(wanted)
        if size < len(data):
            shrunk += 1
            assert host[at : at + size] == wanted
            assert CPU.decode(wanted, len(data)) == data
    assert 4 <= shrunk < len(CHUNKS)
    assert expected_chunk(CHUNKS[-1])[0] > 1


def test_the_device_reads_the_chunks_of_the_cpu(gpu: GpuDevice, coder: RansBatchCoder) -> None:
    plains = [b"".join(runs) for runs in CHUNKS]
    coded = [CPU.encode_runs(b"".join(runs), [len(run) for run in runs]) for runs in CHUNKS]
    assert max(data[0] for data in coded) > 1
    assert decoded_by(coder, gpu, coded, [len(plain) for plain in plains]) == plains


def test_nothing_to_code(gpu: GpuDevice, coder: RansBatchCoder) -> None:
    batch = coder.encode(torch.empty(0, dtype=torch.uint8, device=gpu.device), place([]))
    assert batch.sizes == ()


def test_tables_are_those_of_the_cpu(gpu: GpuDevice) -> None:
    """Histograms of every kind, the largest and the most uneven ones among them."""
    generator = np.random.default_rng(3)
    rows = [np.bincount(np.frombuffer(laplace(n, w, n), np.uint8), minlength=256)
            for n in (1, 2, 40, 300, 4096, 65_536) for w in (0.05, 0.5, 3.0, 12.0, 60.0)]  # fmt: skip
    rows += [np.eye(256, dtype=np.int64)[at] * n for at, n in ((0, 1), (255, 65_536), (7, 100))]
    rows += [np.ones(256, np.int64), np.full(256, 256), np.arange(256), np.array([65_281, *[1] * 255])]
    rows += [generator.multinomial(5000, generator.dirichlet(np.full(256, a))) for a in (0.01, 0.1, 1.0)]
    counts = gpu.upload(torch.tensor(np.stack(rows), dtype=torch.int32))
    with gpu.active():
        codes, tables, sizes = (gpu.download(each).numpy() for each in write_tables(gpu, counts))
    for row, code, table, size in zip(rows, codes, tables, sizes, strict=True):
        levels = choose_levels(row)
        frequencies = frequencies_of(levels).astype(np.int64)
        assert table[:size].tobytes() == pack_table(levels)
        assert ((code[:256] & 8191) == frequencies).all()
        occurs = frequencies > 0
        before = np.cumsum(frequencies) - frequencies
        assert ((code[:256] >> 13)[occurs] == before[occurs]).all()
        assert (code[256:].view(np.uint32)[occurs] == (2**32 - 1) // frequencies[occurs]).all()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_is_judged_as_on_the_cpu(gpu: GpuDevice, coder: RansBatchCoder, data: st.DataObject) -> None:
    runs = data.draw(st.sampled_from([CHUNKS[4], CHUNKS[5], CHUNKS[3], (laplace(300, 9.0),)]))
    plain = b"".join(runs)
    if data.draw(st.booleans()):
        coded = bytearray(CPU.encode(plain))
    else:
        steps, levels = (
            -(-len(plain) // 32),
            choose_levels(np.bincount(np.frombuffer(plain, np.uint8), minlength=256)),
        )
        first = data.draw(st.integers(1, max(1, steps - 1)))
        lengths = [first, steps - first] if steps > 1 else [1]
        coded = bytearray(rans_reference.encode(plain, [(length, levels.tolist()) for length in lengths]))
    kind = data.draw(st.sampled_from(["bytes", "start", "cut", "more", "size"]))
    size = len(plain)
    if kind in ("bytes", "start"):
        last = min(len(coded), 70) if kind == "start" else len(coded)
        for _ in range(data.draw(st.integers(1, 3))):
            coded[data.draw(st.integers(0, last - 1))] = data.draw(
                st.sampled_from([0, 1, 2, 16, 17, 255, 128])
            )
    elif kind == "cut":
        del coded[data.draw(st.integers(1, len(coded) - 1)) :]
    elif kind == "more":
        coded += bytes(data.draw(st.integers(1, 4)))
    else:
        size = data.draw(st.integers(1, size + 70))
    try:
        wanted = [CPU.decode(bytes(coded), size)]
    except EntropyDecodeError:
        wanted = None
    assert decoded_by(coder, gpu, [bytes(coded)], [size]) == wanted


def test_a_damaged_chunk_is_found_among_sound_ones(gpu: GpuDevice, coder: RansBatchCoder) -> None:
    plain = laplace(700, 2.0)
    coded = CPU.encode(plain)
    broken = coded[:-2] + bytes(2)
    assert decoded_by(coder, gpu, [coded, broken, coded], [700] * 3) is None
    assert decoded_by(coder, gpu, [coded, coded], [700] * 2) == [plain] * 2


@pytest.mark.parametrize("size", [1, 32, 33, 4095, 20_000, 65_536])
@pytest.mark.parametrize("run", [1, 40, 2048, 3200, 6400, 70_000])
def test_segments_are_whole_and_few(size: int, run: int) -> None:
    runs = [run] * (size // run) + [size % run] * (size % run > 0)
    steps = segments_of(size, runs)
    assert sum(steps) == -(-size // 32)
    assert 1 <= len(steps) <= 16
    assert len(steps) == 1 or min(steps) >= 32
    assert segments_of(size, ()) == [-(-size // 32)]
    if (run, size) == (6400, 65_536):
        assert steps[:10] == [200] * 9 + [248]
