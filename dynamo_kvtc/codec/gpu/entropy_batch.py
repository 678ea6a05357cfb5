"""Entropy coding of many chunks at once: where chunks lie, and what a coder of batches must do.

Planning is arithmetic on the host; all sizes are known before anything is launched.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dynamo_kvtc.codec.entropy import DEFLATE, MAX_DEFLATE_CHUNK_BYTES, EntropyCoder, HuffmanCoder, find_coder
from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.header import Profile
from dynamo_kvtc.errors import EntropyDecodeError, SizeLimitError

__all__ = ["SLOT_ALIGNMENT", "BatchCoder", "CodedBatch", "HostBatchCoder", "Slots", "default_coder", "place"]

#: Bytes at whose multiples chunks begin in a batch; nvCOMP asks for no more.
SLOT_ALIGNMENT = 16


@dataclass(frozen=True)
class Slots:
    """Places of chunks in one buffer.

    Attributes
    ----------
    offsets, sizes : tuple[int, ...]
        First byte, a multiple of `SLOT_ALIGNMENT`, and bytes of each chunk.
    total : int
        Bytes of the buffer.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    total: int


def place(sizes: Sequence[int]) -> Slots:
    """Place chunks one after the other, each aligned.

    Raises
    ------
    SizeLimitError
        If a chunk is empty or larger than a DEFLATE chunk may be.
    """
    offsets, total = [], 0
    for size in sizes:
        if not 0 < size <= MAX_DEFLATE_CHUNK_BYTES:
            raise SizeLimitError(
                f"a chunk of {size} bytes in a batch; 1 to {MAX_DEFLATE_CHUNK_BYTES} are coded"
            )
        offsets.append(total)
        total += -(-size // SLOT_ALIGNMENT) * SLOT_ALIGNMENT
    return Slots(tuple(offsets), tuple(sizes), total)


@dataclass(frozen=True, eq=False)
class CodedBatch:
    """Chunks after coding.

    Attributes
    ----------
    data : torch.Tensor
        uint8 on the device.
    offsets, sizes : tuple[int, ...]
        First byte and coded bytes of each chunk.
    """

    data: torch.Tensor
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


class BatchCoder(ABC):
    """Codes batches of chunks of one `coder_id` on the device's stream. Thread-safe."""

    coder_id: int
    name: str

    @abstractmethod
    def encode(self, plain: torch.Tensor, slots: Slots) -> CodedBatch:
        """Encode chunks; blocks the calling thread until the coded sizes are known.

        Parameters
        ----------
        plain : torch.Tensor
            uint8 on the device; chunks lie as `slots` say.
        """

    @abstractmethod
    def decode(
        self, data: torch.Tensor, source: Slots, plain: torch.Tensor, target: Slots
    ) -> Callable[[], None]:
        """Begin to decode chunks whose checksums have been verified.

        Parameters
        ----------
        data : torch.Tensor
            uint8 on the device, with the coded chunks at `source`.
        plain : torch.Tensor
            uint8, written at `target`, whose sizes are what each chunk decodes to.

        Returns
        -------
        Callable
            To be called once the stream's work is done: raises `EntropyDecodeError` if a chunk did not
            decode to its size.
        """


class HostBatchCoder(BatchCoder):
    """One chunk after the other on the CPU: for tests, and for coders that no GPU knows.

    Parameters
    ----------
    coder : EntropyCoder
        Does the work.
    """

    def __init__(self, gpu: GpuDevice, coder: EntropyCoder) -> None:
        self._gpu, self._coder = gpu, coder
        self.coder_id, self.name = coder.coder_id, f"{coder.name} on the CPU"

    def encode(self, plain: torch.Tensor, slots: Slots) -> CodedBatch:
        """Encode chunks; see `BatchCoder.encode`."""
        host = plain.cpu().numpy().data
        coded = [
            self._coder.encode(host[at : at + size])
            for at, size in zip(slots.offsets, slots.sizes, strict=True)
        ]
        offsets, total = [], 0
        for chunk in coded:
            offsets.append(total)
            total += -(-len(chunk) // SLOT_ALIGNMENT) * SLOT_ALIGNMENT
        joined = bytearray(total)
        for at, chunk in zip(offsets, coded, strict=True):
            joined[at : at + len(chunk)] = chunk
        data = torch.frombuffer(joined, dtype=torch.uint8) if total else torch.empty(0, dtype=torch.uint8)
        return CodedBatch(self._gpu.upload(data), tuple(offsets), tuple(map(len, coded)))

    def decode(
        self, data: torch.Tensor, source: Slots, plain: torch.Tensor, target: Slots
    ) -> Callable[[], None]:
        """Decode chunks; see `BatchCoder.decode`."""
        host = data.cpu().numpy().data
        for at, size, to, plain_size in zip(
            source.offsets, source.sizes, target.offsets, target.sizes, strict=True
        ):
            decoded = self._coder.decode(host[at : at + size], plain_size)
            if len(decoded) != plain_size:
                raise EntropyDecodeError(f"{self.name} returned {len(decoded)} of {plain_size} bytes")
            chunk = torch.frombuffer(bytearray(decoded), dtype=torch.uint8)
            plain[to : to + plain_size] = chunk.to(plain.device)
        return lambda: None


def default_coder(gpu: GpuDevice, profile: Profile) -> BatchCoder:
    """Return the coder of DEFLATE chunks: nvCOMP's, or the CPU's in the interpreter.

    Raises
    ------
    MissingDependencyError
        If nvCOMP is needed and not installed.
    """
    if gpu.is_interpreter:
        return HostBatchCoder(gpu, HuffmanCoder() if profile is Profile.RD else find_coder(DEFLATE))
    from dynamo_kvtc.codec.gpu.nvcomp_deflate import NvcompDeflate

    return NvcompDeflate(gpu)
