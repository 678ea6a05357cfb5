"""Checksums on the device: xxhash's of every size that the kernel takes, and damage anywhere is found."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.gpu.kernels.xxh3 import CHECKSUM, PADDING, SHORTEST, check_chunks, make_keys
from dynamo_kvtc.codec.header import align

#: Around the borders of stripes (64 bytes) and blocks (1,024), of both at once, and the largest chunk.
SIZES = (
    241, 242, 255, 256, 257, 319, 320, 321, 959, 960, 961, 1023, 1024, 1025, 1026, 1087, 1088, 1089, 1151,
    1152, 2047, 2048, 2049, 2111, 2112, 2113, 3000, 4095, 4096, 4097, 10_007, 65_535, 65_536,
)  # fmt: skip


def noise(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng([size, seed]).integers(0, 256, size, dtype=np.uint8).tobytes()


def digest(chunk: bytes) -> int:
    return xxhash.xxh3_64_intdigest(chunk)


def faults_of(
    gpu: GpuDevice, chunks: Sequence[bytes], checksums: Sequence[int], padding: bytes = b""
) -> list[int]:
    """What the device says of chunks whose padding begins with `padding`; what follows it is not zero."""
    image, places = bytearray(b"\xff" * 48), []
    for chunk, checksum in zip(chunks, checksums, strict=True):
        places.append((len(image), len(chunk), checksum - (checksum >> 63 << 64)))
        room = align(len(chunk)) - len(chunk)
        image += chunk + padding[:room].ljust(room, b"\0") + b"\xff" * 16
    with gpu.active():
        data = gpu.upload(torch.frombuffer(image, dtype=torch.uint8))
        table = gpu.upload(torch.tensor(places, dtype=torch.int64))
        return gpu.download(check_chunks(gpu, data, table, make_keys(gpu))).tolist()


def test_checksums_are_those_of_the_package(gpu: GpuDevice) -> None:
    chunks = [noise(size) for size in SIZES] + [bytes(300), b"\xff" * 2000]
    assert faults_of(gpu, chunks, [digest(chunk) for chunk in chunks]) == [0] * len(chunks)


def test_another_checksum_is_told_from_the_chunk_s_own(gpu: GpuDevice) -> None:
    chunks = [noise(size) for size in SIZES[:20]]
    for bit in (0, 31, 32, 63):
        wrong = [digest(chunk) ^ 1 << bit for chunk in chunks]
        assert faults_of(gpu, chunks, wrong) == [CHECKSUM] * len(chunks)


@pytest.mark.parametrize("size", [241, 1025, 1088, 2500])
def test_a_flipped_bit_is_found_in_every_byte(gpu: GpuDevice, size: int) -> None:
    chunk = noise(size)
    places = range(0, size, 7) if size > 300 else range(size)
    damaged = []
    for at in [*places, size - 1]:
        copy = bytearray(chunk)
        copy[at] ^= 1 << at % 8
        damaged.append(bytes(copy))
    found = faults_of(gpu, [*damaged, chunk], [digest(chunk)] * (len(damaged) + 1))
    assert found == [CHECKSUM] * len(damaged) + [0]


def test_padding_that_is_not_zero_is_found(gpu: GpuDevice) -> None:
    for size in (SHORTEST, 250, 255, 1024 + 3):
        chunk, room = noise(size), align(size) - size
        for at in range(room):
            assert faults_of(gpu, [chunk], [digest(chunk)], bytes(at) + b"\x01") == [PADDING]
        assert faults_of(gpu, [chunk], [digest(chunk) ^ 1], b"\x80") == [CHECKSUM | PADDING]
    whole = noise(1024)
    assert faults_of(gpu, [whole], [digest(whole)], b"\x01") == [0]


def test_nothing_to_check(gpu: GpuDevice) -> None:
    none = torch.empty((0, 3), dtype=torch.int64, device=gpu.device)
    data = torch.empty(0, dtype=torch.uint8, device=gpu.device)
    assert check_chunks(gpu, data, none, make_keys(gpu)).tolist() == []


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_batch_is_judged_as_by_the_package(gpu: GpuDevice, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(SHORTEST, 5000), min_size=1, max_size=6))
    chunks = [noise(size, data.draw(st.integers(0, 3))) for size in sizes]
    checksums = [digest(chunk) for chunk in chunks]
    expected = [0] * len(chunks)
    for index in data.draw(st.sets(st.integers(0, len(chunks) - 1))):
        copy = bytearray(chunks[index])
        copy[data.draw(st.integers(0, len(copy) - 1))] ^= data.draw(st.integers(1, 255))
        chunks[index] = bytes(copy)
        expected[index] = CHECKSUM
    assert faults_of(gpu, chunks, checksums) == expected
