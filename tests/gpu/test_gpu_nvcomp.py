"""nvCOMP's DEFLATE and the CPU's read each other, asynchronously and in batches of known sizes."""

from __future__ import annotations

import importlib.util
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from isal import isal_zlib

from dynamo_kvtc.codec.entropy import DEFLATE, MAX_DEFLATE_CHUNK_BYTES, HuffmanCoder, find_coder
from dynamo_kvtc.codec.gpu.coders import default_coder
from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.gpu.entropy_batch import BatchCoder, HostBatchCoder, Slots, place
from dynamo_kvtc.errors import EntropyDecodeError, MissingDependencyError

SIZES = (1, 2, 17, 255, 4096, 10_001, 65_535, 65_536)


def _missing() -> str | None:
    if not torch.cuda.is_available():
        return "needs an NVIDIA GPU"
    found = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.nvcomp")
    return None if found else "needs nvCOMP: pip install 'dynamo-kvtc[nvcomp]'"


needs_nvcomp = pytest.mark.skipif(_missing() is not None, reason=str(_missing()))


def payloads(seed: int) -> list[bytes]:
    """Symbols as packed sections have them: peaked, of many rates; zeros; noise that does not shrink."""
    generator = np.random.default_rng(seed)
    made = []
    for size in SIZES:
        scale = 10 ** generator.uniform(-0.5, 1.5)
        made.append(np.rint(generator.laplace(0, scale, size)).astype(np.int8).tobytes())
        made.append(bytes(size))
        made.append(generator.integers(0, 256, size, dtype=np.uint8).tobytes())
    return made


def inflate_zlib(data: bytes, size: int) -> bytes:
    inflate = zlib.decompressobj(wbits=-15)
    plain = inflate.decompress(data, size + 1)
    assert inflate.eof and not inflate.unused_data
    return plain


def inflate_isal(data: bytes, size: int) -> bytes:
    return find_coder(DEFLATE).decode(data, size)


def deflate_zlib(data: bytes) -> bytes:
    deflate = zlib.compressobj(6, zlib.DEFLATED, -15)
    return deflate.compress(data) + deflate.flush()


def deflate_isal(data: bytes) -> bytes:
    deflate = isal_zlib.compressobj(level=1, wbits=-9)
    return bytes(deflate.compress(data) + deflate.flush())


def on_device(gpu: GpuDevice, chunks: list[bytes]) -> tuple[torch.Tensor, Slots]:
    slots = place([len(chunk) for chunk in chunks])
    host = torch.zeros(slots.total, dtype=torch.uint8)
    for chunk, at in zip(chunks, slots.offsets, strict=True):
        host[at : at + len(chunk)] = torch.frombuffer(bytearray(chunk), dtype=torch.uint8)
    return gpu.upload(host), slots


def coded_by(coder: BatchCoder, gpu: GpuDevice, chunks: list[bytes]) -> list[bytes]:
    with gpu.active():
        plain, slots = on_device(gpu, chunks)
        batch = coder.encode(plain, slots)
    host = gpu.download(batch.data).numpy().tobytes()
    return [host[at : at + size] for at, size in zip(batch.offsets, batch.sizes, strict=True)]


@pytest.mark.gpu
@needs_nvcomp
@pytest.mark.parametrize("inflate", [inflate_zlib, inflate_isal])
def test_the_cpu_reads_what_nvcomp_writes(gpu: GpuDevice, inflate: Callable[[bytes, int], bytes]) -> None:
    from dynamo_kvtc.codec.gpu.nvcomp_deflate import NvcompDeflate

    coder = NvcompDeflate(gpu)
    chunks = payloads(0)
    for chunk, data in zip(chunks, coded_by(coder, gpu, chunks), strict=True):
        assert len(data) <= coder.encode_bytes([len(chunk)])
        assert inflate(data, len(chunk)) == chunk


@pytest.mark.gpu
@needs_nvcomp
@pytest.mark.parametrize("deflate", [deflate_zlib, deflate_isal, HuffmanCoder().encode])
def test_nvcomp_reads_what_the_cpu_writes(gpu: GpuDevice, deflate: Callable[[bytes], bytes]) -> None:
    from dynamo_kvtc.codec.gpu.nvcomp_deflate import NvcompDeflate

    coder = NvcompDeflate(gpu)
    # The format stores what does not shrink: a coded chunk is always the smaller one.
    pairs = [(chunk, deflate(chunk)) for chunk in payloads(1)]
    pairs = [(chunk, data) for chunk, data in pairs if len(data) < len(chunk)]
    with gpu.active():
        data, source = on_device(gpu, [coded for _, coded in pairs])
        target = place([len(chunk) for chunk, _ in pairs])
        plain = torch.full((target.total,), 0xAA, dtype=torch.uint8, device=gpu.device)
        check = coder.decode(data, source, plain, target)
        done = gpu.record()
    done.wait()
    check()
    host = gpu.download(plain).numpy().tobytes()
    for (chunk, _), at in zip(pairs, target.offsets, strict=True):
        assert host[at : at + len(chunk)] == chunk


@pytest.mark.gpu
@needs_nvcomp
def test_nothing_waits_for_the_device_until_it_is_asked(gpu: GpuDevice) -> None:
    from dynamo_kvtc.codec.gpu.nvcomp_deflate import NvcompDeflate

    coder = NvcompDeflate(gpu)
    chunk = bytes(MAX_DEFLATE_CHUNK_BYTES)
    coded = HuffmanCoder().encode(chunk)
    with gpu.active():
        data, source = on_device(gpu, [coded] * 64)
        target = place([len(chunk)] * 64)
        plain = torch.empty(target.total, dtype=torch.uint8, device=gpu.device)
        coder.decode(data, source, plain, target)  # makes this thread's codec
        gpu.record().wait()
        torch.cuda._sleep(1 << 30)
        check = coder.decode(data, source, plain, target)
        done = gpu.record()
        assert not done.reached()
    done.wait()
    check()


@pytest.mark.gpu
@needs_nvcomp
def test_a_chunk_of_another_size_is_an_error(gpu: GpuDevice) -> None:
    from dynamo_kvtc.codec.gpu.nvcomp_deflate import NvcompDeflate

    coder = NvcompDeflate(gpu)
    with gpu.active():
        data, source = on_device(gpu, [HuffmanCoder().encode(bytes(1000))])
        target = place([2000])
        plain = torch.empty(target.total, dtype=torch.uint8, device=gpu.device)
        with pytest.raises(EntropyDecodeError):
            check = coder.decode(data, source, plain, target)
            gpu.record().wait()
            check()


def test_without_nvcomp_the_cpus_coder_takes_its_place(
    gpu: GpuDevice, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from dynamo_kvtc.codec.gpu import nvcomp_deflate

    def refuse(device: GpuDevice) -> BatchCoder:
        raise MissingDependencyError("nvCOMP is not installed")

    monkeypatch.setattr(nvcomp_deflate, "NvcompDeflate", refuse)
    monkeypatch.setattr(type(gpu), "is_interpreter", False)
    coder = default_coder(gpu, HuffmanCoder())
    assert isinstance(coder, HostBatchCoder)
    assert "entropy-coded on the CPU, which is slower: nvCOMP is not installed" in caplog.text
    chunks = payloads(2)
    for chunk, data in zip(chunks, coded_by(coder, gpu, chunks), strict=True):
        assert inflate_zlib(data, len(chunk)) == chunk
        assert len(data) <= coder.encode_bytes([len(chunk)])
