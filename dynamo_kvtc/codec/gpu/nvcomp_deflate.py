"""DEFLATE (RFC 1951, nothing around it) on the GPU by nvCOMP, in batches, asynchronous on the codec's stream.

Written against nvCOMP 6.0's own descriptions of its Python interface: `as_arrays` carves a batch out of one
buffer, a configuration made from plain sizes keeps decoding from reading streams back, and nothing waits
before sizes are asked for. **Not run on a GPU yet**; `tests/gpu/test_gpu_nvcomp.py` must pass there.

nvCOMP's licence allows its use on systems with NVIDIA GPUs only: it is an extra that the user installs, never
imported before a GPU is there, and never the CPU path. Decompressors assume valid input, so checksums are
verified before a chunk comes here. Its ANS is not used: those streams change between versions.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from dynamo_kvtc.codec.entropy import DEFLATE, MAX_DEFLATE_CHUNK_BYTES
from dynamo_kvtc.codec.gpu.device import GpuDevice, require_gpu
from dynamo_kvtc.codec.gpu.entropy_batch import SLOT_ALIGNMENT, BatchCoder, CodedBatch, Slots
from dynamo_kvtc.errors import EntropyDecodeError, GpuUnavailableError, MissingDependencyError

__all__ = ["NvcompDeflate"]

#: Entropy coding only, no search: matches hurt these payloads (`docs/science.md`).
_ENTROPY_ONLY = 0


def _load_nvcomp() -> Any:
    require_gpu()
    try:
        from nvidia import nvcomp
    except ImportError as error:
        raise MissingDependencyError(
            "nvCOMP is not installed: pip install 'dynamo-kvtc[nvcomp]' (nvcomp-cu12 on CUDA 12)"
        ) from error
    if not hasattr(nvcomp, "BatchArray"):
        raise MissingDependencyError(
            f"nvCOMP {nvcomp.__version__} has no batches with sizes known beforehand; install 6.0 or later"
        )
    return nvcomp


class NvcompDeflate(BatchCoder):
    """Batches of DEFLATE chunks.

    Raises
    ------
    GpuUnavailableError
        If there is no GPU.
    MissingDependencyError
        If nvCOMP is not installed, or too old.
    """

    coder_id = DEFLATE
    name = "nvCOMP DEFLATE"

    def __init__(self, gpu: GpuDevice) -> None:
        self._nvcomp = _load_nvcomp()
        if gpu.stream is None:
            raise GpuUnavailableError("nvCOMP needs a CUDA stream; use HostBatchCoder in the interpreter")
        self._gpu, self._cuda_stream = gpu, gpu.stream.cuda_stream
        # A codec of nvCOMP's may be used by one thread only.
        self._local = threading.local()
        codec = self._codec()
        alignment = max(
            codec.get_required_compression_alignment(), codec.get_required_decompression_alignment()
        )
        if SLOT_ALIGNMENT % alignment:
            raise MissingDependencyError(f"this nvCOMP aligns chunks to {alignment} bytes; install 6.0")
        largest = torch.empty(MAX_DEFLATE_CHUNK_BYTES, dtype=torch.uint8, device=gpu.device)
        bound = codec.get_max_comp_buffer_size(self._nvcomp.as_array(largest))
        self._stride = -(-int(bound) // SLOT_ALIGNMENT) * SLOT_ALIGNMENT

    def _codec(self) -> Any:
        if not hasattr(self._local, "codec"):
            self._local.codec = self._nvcomp.Codec(
                algorithm="Deflate",
                algorithm_type=_ENTROPY_ONLY,
                bitstream_kind=self._nvcomp.BitstreamKind.RAW,
                uncomp_chunk_size=MAX_DEFLATE_CHUNK_BYTES,
                device_id=self._gpu.device.index,
                cuda_stream=self._cuda_stream,
            )
        return self._local.codec

    def _batch(self, buffer: torch.Tensor, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Any:
        return self._nvcomp.as_arrays(buffer, list(offsets), list(sizes), cuda_stream=self._cuda_stream)

    def encode_bytes(self, sizes: Sequence[int]) -> int:
        """Return the bytes of the slots, each as large as the largest chunk may become."""
        return self._stride * len(sizes)

    def encode(self, plain: torch.Tensor, slots: Slots) -> CodedBatch:
        """Encode chunks; see `BatchCoder.encode`."""
        count = len(slots.sizes)
        data = torch.empty(count * self._stride, dtype=torch.uint8, device=plain.device)
        if not count:
            return CodedBatch(data, (), ())
        offsets = tuple(range(0, count * self._stride, self._stride))
        out = self._batch(data, offsets, (self._stride,) * count)
        coded = self._codec().encode(self._batch(plain, slots.offsets, slots.sizes), out=out)
        # Waits in the thread that encodes, with a deadline: asking for the sizes would wait without.
        self._gpu.record().wait()
        sizes = tuple(int(size) for size in coded.buffer_sizes)
        return CodedBatch(data, offsets, sizes)

    def decode(
        self, data: torch.Tensor, source: Slots, plain: torch.Tensor, target: Slots
    ) -> Callable[[], None]:
        """Begin to decode chunks; see `BatchCoder.decode`."""
        if not source.sizes:
            return lambda: None
        codec = self._codec()
        # From the known sizes: nvCOMP would otherwise read the streams and wait for the device.
        config = codec.decompression_config(codec.compression_config(list(target.sizes)))
        with _refused():
            decoded = codec.decode(
                self._batch(data, source.offsets, source.sizes),
                out=self._batch(plain, target.offsets, target.sizes),
                decompression_config=config,
            )

        def check() -> None:
            with _refused():
                found = [int(size) for size in decoded.buffer_sizes]
            if found != list(target.sizes):
                raise EntropyDecodeError("a chunk did not decode to its size; drop the stream")

        return check


@contextmanager
def _refused() -> Iterator[None]:
    """Turn what nvCOMP raises about chunks into the error that readers of streams know."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise EntropyDecodeError(f"nvCOMP does not inflate a chunk ({error}); drop the stream") from error
