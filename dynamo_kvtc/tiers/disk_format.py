"""The disk tier's file format: segment files of records, and reading them back.

A segment file is ``segment-<serial, 16 hex digits>.kvtc``. Everything starts at a multiple of
`BLOCK_BYTES`. Integers are little-endian, checksums are XXH3-64.

Block 0 holds the segment header: magic ``KVTCSEG1``, u32 version (1), u32 zero, 16 random bytes (the
segment's nonce), u64 serial, u64 checksum of all before; zeros to the end of the block.

A record is a header of `RECORD_HEADER_BYTES`, the object's bytes, and room to the end of the block. The
header: magic ``KVTCREC1``, u32 version (1), u32 zero, 32 bytes key, u64 size of the object, u64 checksum
of the object, u64 checksum of the header's bytes before it, seeded with the first 8 bytes of the nonce;
zeros to its end. The seed keeps bytes that were stored as an object from passing for a record.

A record exists once its header is written, which happens after the object's bytes. An evicted record is
a hole. So a scan that skips holes and whatever is not a valid header finds exactly the whole objects.
"""

from __future__ import annotations

import errno
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import xxhash

from dynamo_kvtc.errors import TierError
from dynamo_kvtc.tiers.base import KEY_BYTES, TierKey

__all__ = [
    "BLOCK_BYTES",
    "RECORD_HEADER_BYTES",
    "WRITER_PREFIX",
    "Record",
    "SegmentHeader",
    "SegmentScan",
    "StoredObject",
    "object_intact",
    "record_bytes",
    "record_header",
    "record_in_place",
    "scan_segment",
    "segment_files",
    "segment_header",
    "segment_name",
    "stored_objects",
    "tier_folders",
]

#: Alignment of segment headers and records, in bytes: the unit in which file systems give space back.
BLOCK_BYTES = 4096

#: Bytes of a record before the object's own.
RECORD_HEADER_BYTES = 128

#: How the folder of each worker begins in a folder that several share (`dynamo_kvtc.tiers.shared`).
WRITER_PREFIX = "writer-"

_VERSION = 1
_SEGMENT = struct.Struct("<8sII16sQ")
_SEGMENT_MAGIC = b"KVTCSEG1"
_RECORD = struct.Struct(f"<8sII{KEY_BYTES}sQQ")
_RECORD_MAGIC = b"KVTCREC1"
_CHECKSUM = struct.Struct("<Q")
_NAME = re.compile(r"segment-([0-9a-f]{16})\.kvtc")
_HASH_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class SegmentHeader:
    """Serial number of a segment (its order of creation) and its nonce."""

    serial: int
    nonce: bytes

    @property
    def seed(self) -> int:
        """Seed of the segment's record header checksums."""
        return int.from_bytes(self.nonce[:8], "little")


@dataclass(frozen=True, slots=True)
class Record:
    """A whole object in a segment; `offset` is where the object's own bytes begin."""

    key: TierKey
    offset: int
    nbytes: int
    checksum: int

    @property
    def start(self) -> int:
        """Where the record begins."""
        return self.offset - RECORD_HEADER_BYTES

    @property
    def stop(self) -> int:
        """Where the next record may begin."""
        return self.start + record_bytes(self.nbytes)


@dataclass(frozen=True, slots=True)
class SegmentScan:
    """What `scan_segment` found: records by ascending offset, and how many damaged headers it skipped."""

    header: SegmentHeader
    records: list[Record]
    damaged: int


def record_bytes(nbytes: int) -> int:
    """Return the bytes on disk of the record of an object of `nbytes` bytes."""
    return -(-(RECORD_HEADER_BYTES + nbytes) // BLOCK_BYTES) * BLOCK_BYTES


def segment_name(serial: int) -> str:
    """Return the file name of a segment."""
    return f"segment-{serial:016x}.kvtc"


def segment_files(folder: Path) -> list[tuple[int, Path]]:
    """Return serial and path of a folder's segment files, oldest first."""
    found = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted((int(match[1], 16), path) for match, path in found if match)


def tier_folders(folder: Path) -> list[Path]:
    """Return a disk tier's folder, and those of the workers that share it."""
    return [folder, *sorted(folder.glob(f"{WRITER_PREFIX}*"))]


def segment_header(header: SegmentHeader) -> bytes:
    """Return the bytes of a segment's block 0."""
    packed = _SEGMENT.pack(_SEGMENT_MAGIC, _VERSION, 0, header.nonce, header.serial)
    return (packed + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(packed))).ljust(BLOCK_BYTES, b"\0")


def record_header(header: SegmentHeader, key: TierKey, nbytes: int, checksum: int) -> bytes:
    """Return the bytes of a record's header."""
    packed = _RECORD.pack(_RECORD_MAGIC, _VERSION, 0, key, nbytes, checksum)
    digest = xxhash.xxh3_64_intdigest(packed, seed=header.seed)
    return (packed + _CHECKSUM.pack(digest)).ljust(RECORD_HEADER_BYTES, b"\0")


def record_in_place(fd: int, key: TierKey, offset: int, nbytes: int, checksum: int) -> bool:
    """Return whether the header of a record is where it should be; it is compared, not verified. Blocking."""
    raw = os.pread(fd, _RECORD.size, offset - RECORD_HEADER_BYTES)
    return raw == _RECORD.pack(_RECORD_MAGIC, _VERSION, 0, key, nbytes, checksum)


def scan_segment(fd: int) -> SegmentScan | None:
    """Find the whole records of a segment; reads their headers only. Blocking.

    Returns
    -------
    SegmentScan or None
        None if the file does not begin with a whole segment header.

    Raises
    ------
    TierError
        If the segment is of a version that this reader does not know.
    OSError
        If the file cannot be read.
    """
    header = _parse_segment_header(os.pread(fd, BLOCK_BYTES, 0))
    if header is None:
        return None
    size = os.fstat(fd).st_size
    records: list[Record] = []
    damaged = 0
    offset, in_record = BLOCK_BYTES, True
    while offset < size:
        data = _next_data(fd, offset)
        if data is None:
            break
        if data > offset:
            offset, in_record = data, True
        raw = os.pread(fd, RECORD_HEADER_BYTES, offset)
        record = _parse_record_header(header, raw, offset, size)
        if record is not None:
            records.append(record)
            offset, in_record = record.stop, True
            continue
        # An unfinished put has no header at all; its bytes, and a damaged record's, are passed over.
        damaged += in_record and any(raw)
        offset, in_record = offset + BLOCK_BYTES, False
    return SegmentScan(header, records, damaged)


def _next_data(fd: int, offset: int) -> int | None:
    """Return the next block at or after `offset` that is not in a hole."""
    try:
        data = os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        raise
    return data - data % BLOCK_BYTES


def _parse_segment_header(raw: bytes) -> SegmentHeader | None:
    if len(raw) < BLOCK_BYTES:
        return None
    magic, version, reserved, nonce, serial = _SEGMENT.unpack_from(raw)
    (checksum,) = _CHECKSUM.unpack_from(raw, _SEGMENT.size)
    if magic != _SEGMENT_MAGIC or checksum != xxhash.xxh3_64_intdigest(raw[: _SEGMENT.size]):
        return None
    if version != _VERSION or reserved:
        raise TierError(
            f"a segment of format version {version} lies in the folder, this release reads {_VERSION}; "
            f"use another folder or remove the segments"
        )
    return SegmentHeader(serial, nonce)


def _parse_record_header(header: SegmentHeader, raw: bytes, offset: int, size: int) -> Record | None:
    if len(raw) < RECORD_HEADER_BYTES or not raw.startswith(_RECORD_MAGIC):
        return None
    (digest,) = _CHECKSUM.unpack_from(raw, _RECORD.size)
    if digest != xxhash.xxh3_64_intdigest(raw[: _RECORD.size], seed=header.seed):
        return None
    _, version, reserved, key, nbytes, checksum = _RECORD.unpack_from(raw)
    start = offset + RECORD_HEADER_BYTES
    if version != _VERSION or reserved or nbytes < 1 or start + nbytes > size:
        return None
    return Record(key, start, nbytes, checksum)


# --- reading a folder without opening the tier -----------------------------------------------------


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object found by `stored_objects`; `intact` tells whether its bytes match their checksum."""

    path: Path
    record: Record
    intact: bool


def object_intact(fd: int, record: Record) -> bool:
    """Read an object and compare it with its checksum. Blocking; needs `_HASH_PIECE` bytes of memory."""
    digest = xxhash.xxh3_64()
    position, stop = record.offset, record.offset + record.nbytes
    while position < stop:
        piece = os.pread(fd, min(_HASH_PIECE, stop - position), position)
        if not piece:
            return False
        digest.update(piece)
        position += len(piece)
    return digest.intdigest() == record.checksum


def stored_objects(folder: Path) -> Iterator[StoredObject | Path]:
    """Iterate over a tier folder's objects with every checksum verified; changes nothing. Blocking.

    Of a shared folder, over those of every worker.

    Yields
    ------
    StoredObject or Path
        The path of a segment instead, once for its broken header or for each damaged record header.
    """
    for path in [path for part in tier_folders(folder) for _, path in segment_files(part)]:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            scan = scan_segment(fd)
            for _ in range(1 if scan is None else scan.damaged):
                yield path
            for record in scan.records if scan is not None else ():
                yield StoredObject(path, record, object_intact(fd, record))
        finally:
            os.close(fd)
