"""Stored bytes of one layer group of several streams to coefficients on the device.

Checksums are verified before anything is inflated, since nvCOMP assumes valid input (rANS kernels do not): on
the CPU, over the compressed bytes in pinned memory, before they are uploaded; or on the device, where they
were read straight into its memory (`dynamo_kvtc.codec.gpu.landed`). What only shows in a payload (padding,
numbers that no encoder writes) the kernels report (`dynamo_kvtc.codec.gpu.faults`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import xxhash

from dynamo_kvtc.codec.bitstream import Mapper, StreamHeader
from dynamo_kvtc.codec.entropy import STORE, Buffer, find_coder
from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.gpu.entropy_batch import SLOT_ALIGNMENT, BatchCoder, Slots
from dynamo_kvtc.codec.gpu.host_memory import as_tensor
from dynamo_kvtc.codec.gpu.kernels.ranges import copy_ranges
from dynamo_kvtc.codec.header import Chunk, SectionKind, align
from dynamo_kvtc.errors import (
    ChunkChecksumError,
    EntropyDecodeError,
    KvtcError,
    ReservedBitsError,
    TruncatedStreamError,
)

__all__ = [
    "InflatePlan",
    "StoredGroup",
    "check_chunk",
    "check_length",
    "damaged",
    "inflate",
    "plan_inflate",
    "sink_payload",
    "stray_padding",
    "verify",
]

_SIDES = (SectionKind.KEYS, SectionKind.VALUES)


@dataclass(frozen=True, eq=False)
class StoredGroup:
    """One layer group of one stream, verified.

    Attributes
    ----------
    header : StreamHeader
        Of the stream.
    group : int
        Index of the layer group.
    payload : memoryview or torch.Tensor
        The stream's bytes ``header.group_span(group)``; as a tensor, a run of uint8 on the device.
    copies : Mapping[int, memoryview]
        Of a payload on the device, by offset, the stored bytes of the chunks that the host needs.
    """

    header: StreamHeader
    group: int
    payload: memoryview | torch.Tensor
    copies: Mapping[int, memoryview] = field(default_factory=dict)

    @property
    def is_landed(self) -> bool:
        """Whether the payload lies on the device."""
        return isinstance(self.payload, torch.Tensor)

    @property
    def landed(self) -> torch.Tensor:
        """All of the memory that a payload on the device is a run of: uint8 ``[bytes]``."""
        assert isinstance(self.payload, torch.Tensor)
        return self.payload.as_strided((self.payload.untyped_storage().nbytes(),), (1,), 0)

    def stored(self, chunk: Chunk) -> memoryview:
        """Return a chunk's stored bytes; of a payload on the device, only if the host needs them."""
        if isinstance(self.payload, torch.Tensor):
            return self.copies[chunk.offset]
        start = chunk.offset - self.header.group_span(self.group)[0]
        return self.payload[start : start + chunk.stored_size]


def verify(header: StreamHeader, group: int, payload: Buffer) -> StoredGroup:
    """Check length, checksums and padding of one layer group.

    Raises
    ------
    TruncatedStreamError, ChunkChecksumError, ReservedBitsError
        As `dynamo_kvtc.codec.bitstream.read_section` does.
    """
    view = memoryview(payload).cast("B")
    if (error := check_length(header, group, len(view))) is not None:
        raise error
    base = header.group_span(group)[0]
    for chunk in header.chunks_of(group):
        start = chunk.offset - base
        if (error := check_chunk(chunk, view[start : start + align(chunk.stored_size)])) is not None:
            raise error
    return StoredGroup(header, group, view)


def check_length(header: StreamHeader, group: int, nbytes: int) -> KvtcError | None:
    """Return what is wrong with a layer group of `nbytes` bytes, if they are too few or too many."""
    start, stop = header.group_span(group)
    if nbytes == stop - start:
        return None
    return TruncatedStreamError(
        f"layer group {group} spans {stop - start} bytes of the stream, {nbytes} were given"
    )


def check_chunk(chunk: Chunk, padded: memoryview) -> KvtcError | None:
    """Return what is wrong with a chunk's stored bytes or the padding behind them."""
    if xxhash.xxh3_64_intdigest(padded[: chunk.stored_size]) != chunk.checksum:
        return damaged(chunk)
    return stray_padding(chunk) if any(padded[chunk.stored_size :]) else None


def damaged(chunk: Chunk) -> KvtcError:
    """Return the error for a chunk that does not have its checksum."""
    return ChunkChecksumError(f"the chunk at byte {chunk.offset} is damaged; drop the stream")


def stray_padding(chunk: Chunk) -> KvtcError:
    """Return the error for bits behind a chunk."""
    return ReservedBitsError(f"the padding behind the chunk at byte {chunk.offset} is not zero")


def sink_payload(stored: StoredGroup) -> bytearray:
    """Return the plain bytes of the sinks, inflated on the CPU: they are few.

    Raises
    ------
    UnknownCoderError, EntropyDecodeError
        If a chunk cannot be decoded.
    """
    chunks = stored.header.chunks_of(stored.group, SectionKind.SINKS)
    return bytearray().join(_plain(stored, chunk) for chunk in chunks)


def _plain(stored: StoredGroup, chunk: Chunk) -> Buffer:
    data = stored.stored(chunk)
    if chunk.coder_id == STORE:
        return data
    plain = find_coder(chunk.coder_id).decode(data, chunk.plain_size)
    if len(plain) != chunk.plain_size:
        raise EntropyDecodeError(f"coder {chunk.coder_id} returned {len(plain)} of {chunk.plain_size} bytes")
    return plain


@dataclass
class InflatePlan:
    """Where everything of a batch lies, before anything is launched.

    Attributes
    ----------
    starts : list[int]
        First byte of each stream's group in the uploaded buffer, or where it lies on the device.
    stored_bytes : int
        Size of the uploaded buffer; 0 where nothing is uploaded.
    sections : dict[SectionKind, list[tuple[int, int]]]
        First byte and bytes of each stream's payload, by side, in the payload buffer.
    payload_bytes : int
        Size of that buffer.
    source, plain : dict[int, list[tuple[int, int]]]
        By coder, first byte and bytes of the chunks that the device decodes, in the uploaded buffer, and in
        one of aligned slots or, where the coder needs none, in the payload buffer.
    plain_bytes : int
        Size of that buffer.
    from_plain, from_stored : list[tuple[int, int, int]]
        Copies into the payload buffer: from the slots, and of chunks that are stored as they are.
    by_host : list[tuple[StoredGroup, Chunk]]
        Chunks that the host inflates.
    from_host : list[tuple[int, int, int]]
        Copies of these into the payload buffer, from the buffer that they are uploaded in.
    host_bytes : int
        Size of that buffer.
    """

    starts: list[int] = field(default_factory=list)
    stored_bytes: int = 0
    sections: dict[SectionKind, list[tuple[int, int]]] = field(
        default_factory=lambda: {k: [] for k in _SIDES}
    )
    payload_bytes: int = 0
    source: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    plain: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    plain_bytes: int = 0
    from_plain: list[tuple[int, int, int]] = field(default_factory=list)
    from_stored: list[tuple[int, int, int]] = field(default_factory=list)
    by_host: list[tuple[StoredGroup, Chunk]] = field(default_factory=list)
    from_host: list[tuple[int, int, int]] = field(default_factory=list)
    host_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Bytes of all four buffers."""
        return self.stored_bytes + self.plain_bytes + self.payload_bytes + self.host_bytes


def _up(size: int) -> int:
    return -(-size // SLOT_ALIGNMENT) * SLOT_ALIGNMENT


def plan_inflate(groups: Sequence[StoredGroup], decoders: Mapping[int, BatchCoder]) -> InflatePlan:
    """Lay out a batch; sizes come from the headers.

    Parameters
    ----------
    groups : Sequence[StoredGroup]
        All on the host, or all on the device, in one tensor's memory.
    decoders : Mapping[int, BatchCoder]
        What the device decodes, by coder; the host does the rest.
    """
    plan = InflatePlan()
    for stored in groups:
        base = stored.header.group_span(stored.group)[0]
        if isinstance(stored.payload, torch.Tensor):
            plan.starts.append(int(stored.payload.storage_offset()))
        else:
            plan.starts.append(plan.stored_bytes)
            plan.stored_bytes += _up(len(stored.payload))
        for kind in _SIDES:
            begin = plan.payload_bytes
            for chunk in stored.header.chunks_of(stored.group, kind):
                at, to, size = plan.starts[-1] + chunk.offset - base, plan.payload_bytes, chunk.plain_size
                if chunk.coder_id == STORE:
                    plan.from_stored.append((at, to, size))
                elif chunk.coder_id in decoders:
                    in_slot = decoders[chunk.coder_id].needs_slots
                    plan.source.setdefault(chunk.coder_id, []).append((at, chunk.stored_size))
                    plain = plan.plain.setdefault(chunk.coder_id, [])
                    plain.append((plan.plain_bytes if in_slot else to, size))
                    if in_slot:
                        plan.from_plain.append((plan.plain_bytes, to, size))
                        plan.plain_bytes += _up(size)
                else:
                    plan.by_host.append((stored, chunk))
                    plan.from_host.append((plan.host_bytes, to, size))
                    plan.host_bytes += _up(size)
                plan.payload_bytes += size
            plan.sections[kind].append((begin, plan.payload_bytes - begin))
            plan.payload_bytes = _up(plan.payload_bytes)
    return plan


def inflate(
    gpu: GpuDevice,
    decoders: Mapping[int, BatchCoder],
    groups: Sequence[StoredGroup],
    plan: InflatePlan,
    mapper: Mapper = map,
) -> tuple[torch.Tensor, Callable[[], None]]:
    """Upload a batch, unless it is on the device, and begin to inflate it; on the device's stream.

    Parameters
    ----------
    decoders : Mapping[int, BatchCoder]
        What the plan was made for, by coder.
    mapper : Mapper
        Runs what the host inflates.

    Returns
    -------
    tuple
        The payload buffer, uint8 on the device, and what to call once the stream's work is done: it raises
        `EntropyDecodeError` if a chunk did not decode to its size.
    """
    device = gpu.device
    payload = torch.empty(plan.payload_bytes, dtype=torch.uint8, device=device)
    checks: list[Callable[[], None]] = []
    if plan.source or plan.from_stored:
        data = _on_device(gpu, groups, plan)
        with gpu.stage("unpack, dequantise"):
            copy_ranges(gpu, data, payload, plan.from_stored)
    if plan.source:
        slots = torch.empty(plan.plain_bytes, dtype=torch.uint8, device=device)
        with gpu.stage("inflate"):
            for coder_id, source in plan.source.items():
                decoder, at = decoders[coder_id], _slots(source, data.numel())
                plain = slots if decoder.needs_slots else payload
                checks.append(decoder.decode(data, at, plain, _slots(plan.plain[coder_id], plain.numel())))
        with gpu.stage("unpack, dequantise"):
            copy_ranges(gpu, slots, payload, plan.from_plain)
    if plan.by_host:
        with gpu.stage("inflate"):
            host = torch.zeros(plan.host_bytes, dtype=torch.uint8, pin_memory=gpu.stream is not None)
            inflated = mapper(lambda one: _plain(*one), plan.by_host)
            for found, (start, _, size) in zip(inflated, plan.from_host, strict=True):
                host[start : start + size] = as_tensor(found)
        with gpu.stage("copy to device"):
            copy_ranges(gpu, gpu.upload(host), payload, plan.from_host)

    def check() -> None:
        for sound in checks:
            sound()

    return payload, check


def _on_device(gpu: GpuDevice, groups: Sequence[StoredGroup], plan: InflatePlan) -> torch.Tensor:
    """Return uint8 on the device with the groups at their starts."""
    if groups[0].is_landed:
        return groups[0].landed
    parts = [as_tensor(stored.payload) for stored in groups if not isinstance(stored.payload, torch.Tensor)]
    with gpu.stage("copy to device"):
        return gpu.upload_all(parts, plan.starts, plan.stored_bytes)


def _slots(ranges: Sequence[tuple[int, int]], total: int) -> Slots:
    return Slots(tuple(at for at, _ in ranges), tuple(size for _, size in ranges), total)
