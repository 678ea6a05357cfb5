"""Opening a disk tier's folder: find the whole objects, give the rest of the space back."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from dynamo_kvtc.errors import TierError
from dynamo_kvtc.tiers.disk_files import punch_hole
from dynamo_kvtc.tiers.disk_format import (
    BLOCK_BYTES,
    Record,
    SegmentHeader,
    SegmentScan,
    object_intact,
    scan_segment,
    segment_files,
)

__all__ = ["RecoveredSegment", "Recovery", "recover_folder"]

# Segments scanned at a time: small reads all over the disk, which takes them faster side by side.
_SCAN_THREADS = 8


@dataclass(frozen=True, slots=True)
class RecoveredSegment:
    """A segment with at least one whole object."""

    path: Path
    header: SegmentHeader
    records: list[Record]


@dataclass(frozen=True, slots=True)
class Recovery:
    """The segments found, oldest first, and how many damaged records or segments were dropped."""

    segments: list[RecoveredSegment]
    damaged: int


def recover_folder(folder: Path, *, verify_objects: bool) -> Recovery:
    """Scan a locked folder's segments; cut torn tails off, punch out what is no whole object.

    Blocking: one small read per object, or with `verify_objects` one pass over all bytes. Of a key that
    is stored twice (its eviction had not reached the disk) the later object stays. Segments without
    objects are deleted.

    Raises
    ------
    TierError
        If a file cannot be read or written, or is of an unknown version.
    """
    try:
        files = segment_files(folder)
        with ThreadPoolExecutor(_SCAN_THREADS) as threads:
            found = list(threads.map(lambda file: _scan_file(file[0], file[1], verify_objects), files))
        scans = [(path, scan) for (_, path), (scan, _) in zip(files, found, strict=True) if scan is not None]
        latest = {
            record.key: (scan.header.serial, record.offset) for _, scan in scans for record in scan.records
        }
        segments = []
        for path, scan in scans:
            records = [r for r in scan.records if latest[r.key] == (scan.header.serial, r.offset)]
            _give_back_rest(path, records)
            if records:
                segments.append(RecoveredSegment(path, scan.header, records))
    except OSError as error:
        place = error.filename or folder
        raise TierError(
            f"cannot recover {place}: {error.strerror}; check the disk and the file rights"
        ) from error
    return Recovery(segments, sum(damaged for _, damaged in found))


def _scan_file(serial: int, path: Path, verify_objects: bool) -> tuple[SegmentScan | None, int]:
    """Return a segment's scan, less the objects that fail their checksum, and what was damaged."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        scan = scan_segment(fd)
        if scan is None or scan.header.serial != serial:
            # A crash while the segment was begun leaves it empty; anything else is damage.
            empty = not any(os.pread(fd, BLOCK_BYTES, 0))
            path.unlink()
            return None, int(not empty)
        if not verify_objects:
            return scan, scan.damaged
        intact = [record for record in scan.records if object_intact(fd, record)]
        return SegmentScan(scan.header, intact, scan.damaged), scan.damaged + len(scan.records) - len(intact)
    finally:
        os.close(fd)


def _give_back_rest(path: Path, records: list[Record]) -> None:
    if not records:
        path.unlink()
        return
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        position = BLOCK_BYTES
        for record in records:
            punch_hole(fd, position, record.start - position)
            position = record.stop
        os.ftruncate(fd, position)
    finally:
        os.close(fd)
