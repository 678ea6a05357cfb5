"""Entropy coding of many chunks at once: where chunks lie, and what a coder of batches must do.

Planning is arithmetic on the host; all sizes are known before anything is launched.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from dynamo_kvtc.codec.bitstream import Mapper
from dynamo_kvtc.codec.entropy import MAX_DEFLATE_CHUNK_BYTES, EntropyCoder
from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.errors import SizeLimitError

__all__ = ["SLOT_ALIGNMENT", "BatchCoder", "CodedBatch", "HostBatchCoder", "Slots", "place"]

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
    runs : tuple[tuple[int, ...], ...]
        Sizes of each chunk's runs of alike statistics; empty if none of them is known.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    total: int
    runs: tuple[tuple[int, ...], ...] = ()

    @property
    def all_runs(self) -> tuple[tuple[int, ...], ...]:
        """Runs of each chunk; the chunk itself where they are not known."""
        return self.runs or tuple((size,) for size in self.sizes)


def _up(size: int) -> int:
    return -(-size // SLOT_ALIGNMENT) * SLOT_ALIGNMENT


def place(sizes: Sequence[int], runs: Sequence[Sequence[int]] = ()) -> Slots:
    """Place chunks one after the other, each aligned.

    Parameters
    ----------
    runs : Sequence[Sequence[int]], optional
        Sizes of each chunk's runs.

    Raises
    ------
    SizeLimitError
        If a chunk is empty or larger than a DEFLATE or rANS chunk may be.
    """
    offsets, total = [], 0
    for size in sizes:
        if not 0 < size <= MAX_DEFLATE_CHUNK_BYTES:
            raise SizeLimitError(
                f"a chunk of {size} bytes in a batch; 1 to {MAX_DEFLATE_CHUNK_BYTES} are coded"
            )
        offsets.append(total)
        total += _up(size)
    return Slots(tuple(offsets), tuple(sizes), total, tuple(map(tuple, runs)))


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

    #: Whether `decode` inflates on the device. If not, the host inflates chunks before they are uploaded.
    inflates = True

    #: Whether plain chunks must begin at multiples of `SLOT_ALIGNMENT`; if not, they stay where payloads are.
    needs_slots = True

    @abstractmethod
    def encode_bytes(self, sizes: Sequence[int]) -> int:
        """Return the bytes of device memory that `encode` takes for chunks of these plain sizes."""

    @abstractmethod
    def encode(self, plain: torch.Tensor, slots: Slots) -> CodedBatch:
        """Encode chunks; blocks the calling thread until the coded sizes are known.

        Parameters
        ----------
        plain : torch.Tensor
            uint8 on the device; chunks lie as `slots` say, anywhere where the coder needs no slots.
        """

    def decode(
        self, data: torch.Tensor, source: Slots, plain: torch.Tensor, target: Slots
    ) -> Callable[[], None]:
        """Begin to decode chunks whose checksums have been verified; only where `inflates` says so.

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
        raise NotImplementedError(f"{self.name} does not inflate on the device")


class HostBatchCoder(BatchCoder):
    """The CPU's coder, in the interpreter and without nvCOMP: packed symbols cross to the host uncoded.

    Parameters
    ----------
    coder : EntropyCoder
        Does the work.
    mapper : Mapper
        Runs it, as `map` does; in several threads, if it may.
    """

    inflates = False

    def __init__(self, gpu: GpuDevice, coder: EntropyCoder, mapper: Mapper = map) -> None:
        self._gpu, self._coder, self._map = gpu, coder, mapper
        self.coder_id, self.name = coder.coder_id, f"{coder.name} on the CPU"

    def encode_bytes(self, sizes: Sequence[int]) -> int:
        """Return the bytes of the coded chunks at their largest; see `BatchCoder.encode_bytes`."""
        return sum(_up(self._coder.max_encoded_size(size)) for size in sizes)

    def encode(self, plain: torch.Tensor, slots: Slots) -> CodedBatch:
        """Encode chunks; see `BatchCoder.encode`."""
        host = self._gpu.download(plain).numpy().data
        pieces = [host[at : at + size] for at, size in zip(slots.offsets, slots.sizes, strict=True)]
        pairs, together = list(zip(pieces, slots.all_runs, strict=True)), self._coder.batch
        batches = [pairs[start : start + together] for start in range(0, len(pairs), together)]
        coded = list(chain.from_iterable(self._map(self._coder.encode_many, batches)))
        offsets, total = [], 0
        for chunk in coded:
            offsets.append(total)
            total += _up(len(chunk))
        joined = bytearray(total)
        for at, chunk in zip(offsets, coded, strict=True):
            joined[at : at + len(chunk)] = chunk
        data = torch.frombuffer(joined, dtype=torch.uint8) if total else torch.empty(0, dtype=torch.uint8)
        return CodedBatch(self._gpu.upload(data), tuple(offsets), tuple(map(len, coded)))
