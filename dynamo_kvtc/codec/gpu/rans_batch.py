"""rANS on the GPU by kernels of our own, in batches, asynchronous on the codec's stream; needs no nvCOMP.

Segments are cut where runs of alike statistics begin, before anything of the data is known. The CPU's coder
looks at the data as well, so its chunks are smaller by a per cent or two (`docs/gpu.md`); from the same
segments both make the same bytes. Everything is bounded by sizes that are known beforehand: a chunk's slot is
as large as the chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch

from dynamo_kvtc.codec.entropy import RANS
from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.gpu.entropy_batch import SLOT_ALIGNMENT, BatchCoder, CodedBatch, Slots, place
from dynamo_kvtc.codec.gpu.kernels.rans_count import count_bytes
from dynamo_kvtc.codec.gpu.kernels.rans_decode import TABLES, decode_chunks
from dynamo_kvtc.codec.gpu.kernels.rans_encode import encode_chunks
from dynamo_kvtc.codec.gpu.kernels.rans_lanes import LANES, MAX_SEGMENTS, SYMBOLS
from dynamo_kvtc.codec.gpu.kernels.rans_write_table import CODE_WORDS, TABLE_BYTES, write_tables
from dynamo_kvtc.errors import EntropyDecodeError

__all__ = ["RansBatchCoder", "segments_of"]

#: Steps of the shortest segment of a chunk that has several: 1,024 bytes.
_LEAST_STEPS = 32

#: Bytes on the device for a segment (counts, codes, table, its size, steps, place) and a chunk (place, size).
_SEGMENT_BYTES = 4 * SYMBOLS + 4 * CODE_WORDS + TABLE_BYTES + 4 + 4 + 16
_CHUNK_BYTES = 5 * 8 + 4


def segments_of(size: int, runs: Sequence[int]) -> list[int]:
    """Return the steps of the segments of a chunk: each begins at the step that is nearest to a run's start.

    Parameters
    ----------
    size : int
        Bytes of the chunk, at least 1.
    runs : Sequence[int]
        Bytes of its runs; none if they are not known. Short ones are joined to those before them.
    """
    steps = -(-size // LANES)
    least = max(_LEAST_STEPS, -(-steps // MAX_SEGMENTS))
    borders = [0]
    for end in accumulate(runs):
        border = round(end / LANES)
        if border - borders[-1] >= least and steps - border >= least:
            borders.append(border)
    return [stop - start for start, stop in zip(borders, [*borders[1:], steps], strict=True)]


class RansBatchCoder(BatchCoder):
    """Batches of rANS chunks, encoded and decoded on the device."""

    coder_id = RANS
    name = "rANS"
    needs_slots = False

    def __init__(self, gpu: GpuDevice) -> None:
        self._gpu = gpu

    def encode_bytes(self, sizes: Sequence[int]) -> int:
        """Return the bytes of slots and of what is known of segments; see `BatchCoder.encode_bytes`."""
        most = (min(MAX_SEGMENTS, max(1, -(-size // LANES) // _LEAST_STEPS)) for size in sizes)
        slots = sum(-(-size // SLOT_ALIGNMENT) * SLOT_ALIGNMENT for size in sizes)
        return slots + _SEGMENT_BYTES * sum(most) + _CHUNK_BYTES * len(sizes)

    def encode(self, plain: torch.Tensor, slots: Slots) -> CodedBatch:
        """Encode chunks; see `BatchCoder.encode`."""
        gpu, own_slots = self._gpu, place(slots.sizes)
        coded = torch.empty(own_slots.total, dtype=torch.uint8, device=plain.device)
        chunks: list[tuple[int, ...]] = []
        steps: list[int] = []
        segments: list[tuple[int, int]] = []
        for offset, size, runs, to in zip(
            slots.offsets, slots.sizes, slots.all_runs, own_slots.offsets, strict=True
        ):
            own = segments_of(size, runs)
            chunks.append((offset, size, to, len(steps), len(own)))
            at = 0
            for length in own:
                segments.append((offset + at, min(LANES * length, size - at)))
                at += LANES * length
            steps += own
        if not chunks:
            return CodedBatch(coded, (), ())
        places = gpu.upload(torch.tensor(segments, dtype=torch.int64))
        counts = count_bytes(gpu, plain, places, max(size for _, size in segments))
        sizes = encode_chunks(
            gpu,
            plain,
            gpu.upload(torch.tensor(chunks, dtype=torch.int64)),
            gpu.upload(torch.tensor(steps, dtype=torch.int32)),
            write_tables(gpu, counts),
            coded,
        )
        found = gpu.download(sizes).tolist()
        # A chunk ends with its slot; one that has not shrunk is not there.
        ends = (*own_slots.offsets[1:], own_slots.total)
        return CodedBatch(
            coded, tuple(end - size for end, size in zip(ends, found, strict=True)), tuple(found)
        )

    def decode(
        self, data: torch.Tensor, source: Slots, plain: torch.Tensor, target: Slots
    ) -> Callable[[], None]:
        """Begin to decode chunks; see `BatchCoder.decode`."""
        places = (source.offsets, source.sizes, target.offsets, target.sizes)
        chunks = self._gpu.upload(torch.tensor(list(zip(*places, strict=True)), dtype=torch.int64))
        faults = torch.empty(len(source.sizes), dtype=torch.int32, device=data.device)
        decode_chunks(self._gpu, data, plain, chunks, faults)

        def check() -> None:
            for bits in self._gpu.download(faults).tolist():
                if bits:
                    what = "begins with tables or states" if bits & TABLES else "ends with states or words"
                    raise EntropyDecodeError(f"a rANS chunk {what} that no encoder writes; drop the stream")

        return check
