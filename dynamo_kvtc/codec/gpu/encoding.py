"""A batch of tier blocks on its way from the paged cache to streams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import xxhash

from dynamo_kvtc.codec.bitstream import EncodedChunk, StreamHeader, encode_chunk, pack_header
from dynamo_kvtc.codec.entropy import STORE, EntropyCoder
from dynamo_kvtc.codec.geometry import LayerRange
from dynamo_kvtc.codec.gpu.device import DeviceEvent, GpuDevice
from dynamo_kvtc.codec.gpu.entropy_batch import BatchCoder, place
from dynamo_kvtc.codec.gpu.host_memory import as_tensor
from dynamo_kvtc.codec.gpu.kernels.ranges import copy_ranges
from dynamo_kvtc.codec.gpu.sections import Sections
from dynamo_kvtc.codec.gpu.side import GpuSide, SectionSpan
from dynamo_kvtc.codec.gpu.staging import StagingBudget
from dynamo_kvtc.codec.header import Chunk, SectionKind, align, header_size
from dynamo_kvtc.codec.paged_codec import EncodedStream
from dynamo_kvtc.codec.sinks import SinkCodec
from dynamo_kvtc.errors import EncodeRangeError, KvtcError

__all__ = ["DeviceStream", "EncodedSection", "PendingBatch", "gather_sinks"]


@dataclass(frozen=True, eq=False)
class EncodedSection:
    """The keys or values of one layer group of all tier blocks of a batch, as they leave the kernels."""

    layers: LayerRange
    kind: SectionKind
    side: GpuSide
    sections: Sections
    escapes: torch.Tensor


@dataclass(slots=True)
class _Piece:
    """One chunk of a stream: where its bytes come from."""

    layers: LayerRange
    kind: SectionKind
    coder_id: int
    stored_size: int
    plain_size: int
    data: bytes | None = None  # from the host
    source: int = -1  # index into the batch's chunks


class DeviceStream:
    """A stream whose chunks lie in an image on the device; header and checksums are made on the host.

    Parameters
    ----------
    header : StreamHeader
        All fields but the chunk table.
    pieces : Sequence
        Its chunks in stream order.
    image : torch.Tensor
        uint8 ``[bytes]`` on the device: the chunks in their places, zeros elsewhere.
    batch : object
        Holds the bytes of the staging budget that the batch's images take.
    """

    def __init__(
        self,
        gpu: GpuDevice,
        header: StreamHeader,
        pieces: Sequence[_Piece],
        image: torch.Tensor,
        batch: object,
    ) -> None:
        self._gpu, self._header, self._pieces, self._image = gpu, header, pieces, image
        self._batch = batch

    @property
    def nbytes(self) -> int:
        """Size of the stream."""
        return self._image.numel()

    def copy_into(self, target: memoryview) -> None:
        """Write the stream to host memory; see `EncodedStream.copy_into`."""
        view = memoryview(target).cast("B")
        with self._gpu.active(), self._gpu.stage("copy to host"):
            as_tensor(view).copy_(self._image, non_blocking=True)
            self._gpu.record().wait()
        chunks, offset = [], header_size(len(self._pieces))
        for piece in self._pieces:
            end = offset + piece.stored_size
            if piece.data is not None:
                view[offset:end] = piece.data
            checksum = xxhash.xxh3_64_intdigest(view[offset:end])
            chunks.append(
                Chunk(
                    piece.layers,
                    piece.kind,
                    piece.coder_id,
                    offset,
                    piece.stored_size,
                    piece.plain_size,
                    checksum,
                )
            )
            offset = align(end)
        packed = pack_header(replace(self._header, chunks=tuple(chunks)))
        view[: len(packed)] = packed


@dataclass(eq=False)
class PendingBatch:
    """What `GpuCodec.begin_encode` has launched; see `PendingEncode`.

    Attributes
    ----------
    gathered : DeviceEvent
        When the engine may reuse its blocks.
    headers : Sequence[StreamHeader]
        Of each tier block, without chunk tables.
    status : torch.Tensor
        int32 ``[tier blocks]`` on the device: 1 for what cannot be encoded.
    payload : torch.Tensor
        uint8 on the device: all sections' payloads.
    encoded : Sequence[EncodedSection]
        By layer group, keys before values.
    sinks : Sequence[tuple of torch.Tensor or None]
        Sink tokens' keys and values ``[tokens, layers, heads, head_size]`` of each tier block, on the device.
    batch : object
        Holds the batch's bytes of `budget`.
    """

    gpu: GpuDevice
    budget: StagingBudget
    coder: BatchCoder
    sink_codec: SinkCodec
    sink_coder: EntropyCoder
    gathered: DeviceEvent
    headers: Sequence[StreamHeader]
    status: torch.Tensor
    payload: torch.Tensor
    encoded: Sequence[EncodedSection]
    sinks: Sequence[tuple[torch.Tensor, torch.Tensor] | None]
    batch: object

    def streams(self) -> list[EncodedStream | Exception]:
        """Return each tier block's stream or what is wrong with it; see `PendingEncode.streams`."""
        with self.gpu.active():
            # The only numbers that the host needs: one copy, which waits for the kernels.
            parts = [self.status, *(part.escapes for part in self.encoded)]
            numbers = self.gpu.download(torch.stack(parts))
            spans = [
                part.side.spans(part.sections, escapes)
                for part, escapes in zip(self.encoded, numbers[1:].tolist(), strict=True)
            ]
            pieces: list[list[_Piece] | KvtcError | None] = []
            chunks: list[tuple[int, tuple[int, ...]]] = []
            for index, failed in enumerate(numbers[0].tolist()):
                own = self._pieces(index, [span[index] for span in spans], chunks) if not failed else None
                pieces.append(own)
            return self._assemble(pieces, chunks)

    def _pieces(
        self, index: int, spans: Sequence[SectionSpan | None], chunks: list[tuple[int, tuple[int, ...]]]
    ) -> list[_Piece] | KvtcError:
        """Return a tier block's chunks and append those of the device to `chunks` as (start, runs)."""
        if any(span is None for span in spans):
            return EncodeRangeError(
                "the block has more symbols beyond their classes than the format holds; keep it raw, and "
                "recalibrate if it happens often"
            )
        try:
            sinks = self._sink_pieces(index)
        except EncodeRangeError as error:
            return error.with_traceback(None)
        pieces = []
        for part, span in zip(self.encoded, spans, strict=True):
            assert span is not None
            start = span.start
            for runs in span.chunks:
                size = sum(runs)
                pieces.append(_Piece(part.layers, part.kind, STORE, size, size, source=len(chunks)))
                chunks.append((start, runs))
                start += size
            if not span.chunks:
                pieces.append(_Piece(part.layers, part.kind, STORE, 0, 0, data=b""))
            if part.kind is SectionKind.VALUES:
                pieces += [piece for piece in sinks if piece.layers == part.layers]
        return pieces

    def _sink_pieces(self, index: int) -> list[_Piece]:
        found = self.sinks[index]
        if found is None:
            return []
        keys, values = self.gpu.download(torch.stack(found))
        pieces = []
        for layers in dict.fromkeys(part.layers for part in self.encoded):
            span = slice(layers.first, layers.stop)
            payload = self.sink_codec.encode(keys[:, span], values[:, span]).data
            start = 0
            for size in self.sink_codec.chunk_sizes(layers.count, keys.shape[0]):
                chunk: EncodedChunk = encode_chunk(payload[start : start + size], self.sink_coder)
                pieces.append(
                    _Piece(
                        layers, SectionKind.SINKS, chunk.coder_id, len(chunk.data), size, bytes(chunk.data)
                    )
                )
                start += size
        return pieces

    def _assemble(
        self,
        blocks: Sequence[list[_Piece] | KvtcError | None],
        chunks: Sequence[tuple[int, tuple[int, ...]]],
    ) -> list[EncodedStream | Exception]:
        """Entropy-code all chunks in one batch and put each stream's in their places."""
        slots = place([sum(runs) for _, runs in chunks], [runs for _, runs in chunks])
        if self.coder.needs_slots:
            plain = self.payload.new_empty(slots.total)
            with self.gpu.stage("assemble"):
                copy_ranges(
                    self.gpu, self.payload, plain,
                    [
                        (start, to, size)
                        for (start, _), to, size in zip(chunks, slots.offsets, slots.sizes, strict=True)
                    ],
                )  # fmt: skip
        else:
            plain = self.payload
            slots = replace(slots, offsets=tuple(start for start, _ in chunks), total=plain.numel())
        with self.gpu.stage("deflate"):
            coded = self.coder.encode(plain, slots)
        from_coded, from_plain, sizes, total = [], [], [], 0
        for pieces in blocks:
            if not isinstance(pieces, list):
                sizes.append(0)
                continue
            offset = header_size(len(pieces))
            for piece in pieces:
                if piece.source >= 0 and coded.sizes[piece.source] < piece.plain_size:
                    piece.coder_id, piece.stored_size = self.coder.coder_id, coded.sizes[piece.source]
                    from_coded.append((coded.offsets[piece.source], total + offset, piece.stored_size))
                elif piece.source >= 0:
                    from_plain.append((slots.offsets[piece.source], total + offset, piece.stored_size))
                offset = align(offset + piece.stored_size)
            sizes.append(offset)
            total += offset
        with self.gpu.stage("assemble"):
            image = self.payload.new_zeros(total)
            copy_ranges(self.gpu, coded.data, image, from_coded)
            copy_ranges(self.gpu, plain, image, from_plain)
        results: list[EncodedStream | Exception] = []
        start = 0
        for header, pieces, size in zip(self.headers, blocks, sizes, strict=True):
            if isinstance(pieces, list):
                own = image[start : start + size]
                results.append(DeviceStream(self.gpu, header, pieces, own, self.batch))
            else:
                results.append(
                    pieces
                    or EncodeRangeError(
                        "the KV holds NaN or infinity, or coefficients beyond what the profile stores; keep "
                        "this block raw, and recalibrate if it happens often"
                    )
                )
            start += size
        # Only the images are needed from here on.
        self.payload, self.encoded, self.sinks = image.new_empty(0), (), ()
        self.budget.shrink(self.batch, total)
        return results


def gather_sinks(
    gpu: GpuDevice, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], slots: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Copy sink tokens out of the paged views, on the device: ``[tokens, layers, heads, head_size]``.

    They are few: a gather for each layer is not worth a kernel.
    """
    if not slots.numel():
        return None
    place = gpu.upload(slots)
    block_size = keys[0].shape[1]
    block, token = place // block_size, place % block_size
    found = [torch.stack([view[block, token] for view in views], dim=1) for views in (keys, values)]
    return found[0], found[1]
