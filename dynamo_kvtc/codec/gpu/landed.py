"""Stored bytes that were read straight into the device's memory: verified there before anything decodes them.

A kernel looks at checksums and padding (`kernels.xxh3`), one launch for a batch, and the thread that opens
the batch waits for its verdicts. The host gets what it must have anyway: sinks, chunks that the device does
not decode, and those too short for the kernel; it verifies them itself.
"""

from __future__ import annotations

from collections.abc import Container, Sequence

import torch
import xxhash

from dynamo_kvtc.codec.bitstream import StreamHeader
from dynamo_kvtc.codec.entropy import MAX_DEFLATE_CHUNK_BYTES, STORE
from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.gpu.kernels.ranges import copy_ranges
from dynamo_kvtc.codec.gpu.kernels.xxh3 import CHECKSUM, SHORTEST, check_chunks, make_keys
from dynamo_kvtc.codec.gpu.opening import (
    StoredGroup,
    check_chunk,
    check_length,
    damaged,
    stray_padding,
)
from dynamo_kvtc.codec.header import Chunk, SectionKind, align
from dynamo_kvtc.errors import KvtcError

__all__ = ["checksum_problem", "verify_landed"]

#: Bytes of the chunks of a trial: the shortest, one of several blocks, the largest that there are.
_TRIAL_SIZES = (SHORTEST, 3000, MAX_DEFLATE_CHUNK_BYTES)


def verify_landed(
    gpu: GpuDevice,
    decoders: Container[int],
    keys: torch.Tensor,
    headers: Sequence[StreamHeader],
    group: int,
    payloads: Sequence[torch.Tensor],
) -> list[StoredGroup | KvtcError]:
    """Do what `dynamo_kvtc.codec.gpu.opening.verify` does, for a batch; blocks the thread.

    Parameters
    ----------
    decoders : Container[int]
        Coders whose chunks the device decodes.
    keys : torch.Tensor
        Of `dynamo_kvtc.codec.gpu.kernels.xxh3.make_keys`.
    payloads : Sequence[torch.Tensor]
        uint8, runs of one tensor on the device that begin at multiples of 16 bytes.

    Returns
    -------
    list
        For each stream its layer group, or what is wrong with it.
    """
    found: list[dict[int, KvtcError]] = [{} for _ in headers]
    copies: list[dict[int, memoryview]] = [{} for _ in headers]
    lengths: list[KvtcError | None] = []
    here: list[tuple[int, Chunk, int]] = []
    there: list[tuple[int, Chunk, int]] = []
    for index, (header, payload) in enumerate(zip(headers, payloads, strict=True)):
        lengths.append(check_length(header, group, payload.numel()))
        if lengths[-1] is None:
            base = int(payload.storage_offset()) - header.group_span(group)[0]
            for chunk in header.chunks_of(group):
                on_host = _is_for_host(chunk, decoders)
                (here if on_host else there).append((index, chunk, base + chunk.offset))
    with gpu.active():
        data = StoredGroup(headers[0], group, payloads[0]).landed
        ranges, total = [], 0
        for _, chunk, at in here:
            ranges.append((at, total, align(chunk.stored_size)))
            total += align(chunk.stored_size)
        brought = torch.empty(total, dtype=torch.uint8, device=gpu.device)
        copy_ranges(gpu, data, brought, ranges)
        table = [(at, chunk.stored_size, _signed(chunk.checksum)) for _, chunk, at in there]
        faults = check_chunks(gpu, data, gpu.upload(torch.tensor(table, dtype=torch.int64).view(-1, 3)), keys)
    verdicts = gpu.download(faults).tolist()
    for (index, chunk, _), bits in zip(there, verdicts, strict=True):
        if bits:
            found[index][chunk.offset] = damaged(chunk) if bits & CHECKSUM else stray_padding(chunk)
    host = gpu.download(brought).numpy().data
    for (index, chunk, _), (_, start, size) in zip(here, ranges, strict=True):
        error = check_chunk(chunk, host[start : start + size])
        if error is not None:
            found[index][chunk.offset] = error
        copies[index][chunk.offset] = host[start : start + chunk.stored_size]
    results: list[StoredGroup | KvtcError] = []
    for header, payload, length, errors, own in zip(headers, payloads, lengths, found, copies, strict=True):
        first = errors[min(errors)] if errors else None
        results.append(length or first or StoredGroup(header, group, payload, own))
    return results


def checksum_problem(gpu: GpuDevice) -> str | None:
    """Say whether this device's checksums are wrong, by a trial; blocks the thread.

    One that computes something else would drop every object that it reads.
    """
    start, table, parts = 0, [], []
    for size in _TRIAL_SIZES:
        part = torch.arange(align(size)).mul_(37).remainder_(251).to(torch.uint8)
        part[size:] = 0
        checksum = xxhash.xxh3_64_intdigest(part[:size].numpy().data)
        # Each chunk twice: as it is, and with another checksum.
        table += [(start, size, _signed(checksum)), (start, size, _signed(checksum ^ 1))]
        parts.append(part)
        start += align(size)
    try:
        with gpu.active():
            rows = gpu.upload(torch.tensor(table, dtype=torch.int64))
            faults = check_chunks(gpu, gpu.upload(torch.cat(parts)), rows, make_keys(gpu))
        found = gpu.download(faults).tolist()
    except Exception as error:  # whatever a compiler or a driver may raise
        return f"the trial of its checksums failed: {error!r}"
    return None if found == [0, CHECKSUM] * len(parts) else "its checksums are not those of the CPU"


def _is_for_host(chunk: Chunk, decoders: Container[int]) -> bool:
    is_decoded_here = chunk.coder_id == STORE or chunk.coder_id in decoders
    return chunk.kind is SectionKind.SINKS or chunk.stored_size < SHORTEST or not is_decoded_here


def _signed(bits: int) -> int:
    """Return 64 bits as the signed number that they are."""
    return bits - (bits >> 63 << 64)
