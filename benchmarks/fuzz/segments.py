"""Targets ``segment`` and ``folder``: segment files of the disk tier, and the recovery of a folder."""

from __future__ import annotations

import os
import shutil
import struct
from random import Random
from typing import NamedTuple

import xxhash

from benchmarks.fuzz.target import Violation, damage, number, scratch_folder
from dynamo_kvtc.errors import TierError
from dynamo_kvtc.tiers.disk_format import (
    BLOCK_BYTES,
    RECORD_HEADER_BYTES,
    Record,
    SegmentHeader,
    object_intact,
    record_bytes,
    record_header,
    scan_segment,
    segment_header,
    segment_name,
)
from dynamo_kvtc.tiers.disk_recovery import recover_folder

__all__ = ["FolderTarget", "SegmentTarget", "make_segment"]

_SIZES = (1, 100, BLOCK_BYTES - RECORD_HEADER_BYTES, 5000, 9000, 300)
#: Every field of a segment's header and of a record's: struct code and position.
_SEGMENT_FIELDS = (("<Q", 0), ("<I", 8), ("<I", 12), ("<Q", 16), ("<Q", 32), ("<Q", 40))
_RECORD_FIELDS = (("<Q", 0), ("<I", 8), ("<I", 12), ("<Q", 16), ("<Q", 48), ("<Q", 56), ("<Q", 64))


class SegmentCase(NamedTuple):
    """A mutated segment, and whether its checksums were made right again."""

    data: bytes
    forged: bool


def make_segment(serial: int, first: int) -> tuple[bytes, dict[bytes, bytes]]:
    """Return a segment with records and a hole, and its objects by key."""
    random = Random(serial)
    header = SegmentHeader(serial, random.randbytes(16))
    data, objects = bytearray(segment_header(header)), {}
    for index, size in enumerate(_SIZES):
        key, content = (first + index).to_bytes(32, "little"), random.randbytes(size)
        objects[key] = content
        record = record_header(header, key, size, xxhash.xxh3_64_intdigest(content)) + content
        data += record.ljust(record_bytes(size), b"\0")
        if index == 2:
            data += bytes(2 * BLOCK_BYTES)
    return bytes(data), objects


def _check(records: list[Record], fd: int, objects: dict[bytes, set[bytes]], forged: bool) -> int:
    """Judge what a scan found; returns how many objects would be served whole."""
    sound, position = 0, BLOCK_BYTES
    size = os.fstat(fd).st_size
    for record in records:
        if record.start < position or record.offset + record.nbytes > size:
            raise Violation("records overlap or reach beyond the file")
        position = record.stop
        if not object_intact(fd, record):
            continue
        content = os.pread(fd, record.nbytes, record.offset)
        if not forged and content not in objects.get(record.key, ()):
            raise Violation("damage was taken for an object")
        sound += 1
    return sound


def _mutate(random: Random, data: bytearray, other: bytes) -> bool:
    """Change a segment; returns whether its checksums were made right again."""
    forged = random.random() < 0.4
    for _ in range(random.choice((1, 1, 2, 3))):
        act = random.randrange(5)
        blocks = max(1, len(data) // BLOCK_BYTES)
        base = random.randrange(blocks) * BLOCK_BYTES
        if act == 0:
            damage(random, data, other)
        elif act == 1:
            at = base + random.randrange(RECORD_HEADER_BYTES)
            if at < len(data):
                data[at] ^= 1 << random.randrange(8)
        elif act == 2:  # a whole block of here or elsewhere, at another place
            source = data if random.random() < 0.5 else other
            place = random.randrange(blocks) * BLOCK_BYTES
            data[base : base + BLOCK_BYTES] = source[place : place + BLOCK_BYTES]
        elif act == 3:  # a torn write: the end is lost, or zeros
            if random.random() < 0.5:
                del data[random.randrange(len(data) + 1) :]
            else:
                data[base : base + BLOCK_BYTES] = bytes(len(data[base : base + BLOCK_BYTES]))
        else:
            form, position = random.choice(_RECORD_FIELDS if base else _SEGMENT_FIELDS)
            if base + RECORD_HEADER_BYTES <= len(data):
                bits = 8 * struct.calcsize(form)
                struct.pack_into(form, data, base + position, number(random, bits))
    if forged:
        _seal(data)
    return forged


def _seal(data: bytearray) -> None:
    if len(data) < BLOCK_BYTES:
        return
    struct.pack_into("<Q", data, 40, xxhash.xxh3_64_intdigest(bytes(data[:40])))
    (seed,) = struct.unpack_from("<Q", data, 16)
    for base in range(BLOCK_BYTES, len(data) - RECORD_HEADER_BYTES, BLOCK_BYTES):
        if data[base : base + 8] == b"KVTCREC1":
            digest = xxhash.xxh3_64_intdigest(bytes(data[base : base + 64]), seed=seed)
            struct.pack_into("<Q", data, base + 64, digest)


def _contents(*segments: dict[bytes, bytes]) -> dict[bytes, set[bytes]]:
    """Return what was stored under each key, in one segment or another."""
    contents: dict[bytes, set[bytes]] = {}
    for objects in segments:
        for key, content in objects.items():
            contents.setdefault(key, set()).add(content)
    return contents


class SegmentTarget:
    """Scans one mutated segment, in memory."""

    name = "segment"

    def __init__(self) -> None:
        self._golden, objects = make_segment(1, 0)
        self._other, others = make_segment(2, 3)
        self._objects = _contents(objects, others)
        self._fd = os.memfd_create("segment")

    def make(self, random: Random) -> SegmentCase:
        """Return a mutated segment."""
        data = bytearray(self._golden)
        forged = _mutate(random, data, self._other)
        return SegmentCase(bytes(data), forged)

    def judge(self, case: SegmentCase) -> str:
        """Scan it and read every object found; damage must not be taken for an object."""
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, case.data, 0)
        try:
            scan = scan_segment(self._fd)
        except TierError as error:
            return type(error).__name__
        if scan is None:
            return "no segment"
        sound = _check(scan.records, self._fd, self._objects, case.forged)
        if sound == len(_SIZES):
            return "all objects"
        return "some objects" if sound else "no object"

    def bound(self, case: SegmentCase) -> int:
        """Allow an object for each block, and the pieces in which objects are hashed."""
        return (2 << 20) + 2 * len(case.data)


class FolderTarget:
    """Recovers a folder of two mutated segments, one of which may be a copy under another name."""

    name = "folder"

    def __init__(self) -> None:
        self._folder = scratch_folder(self)
        segments = [make_segment(1, 0), make_segment(2, 3)]
        self._golden = [data for data, _ in segments]
        self._objects = _contents(*(objects for _, objects in segments))

    def make(self, random: Random) -> list[tuple[str, SegmentCase]]:
        """Return file names and contents."""
        files = []
        for index, golden in enumerate(self._golden):
            data = bytearray(golden)
            forged = random.random() < 0.8 and _mutate(random, data, self._golden[1 - index])
            serial = index + 1 if random.random() < 0.9 else random.randrange(4)
            files.append((segment_name(serial), SegmentCase(bytes(data), forged)))
        return files

    def judge(self, case: list[tuple[str, SegmentCase]]) -> str:
        """Recover the folder twice: only sound objects, each key once, the same the second time."""
        folder = self._folder / "tier"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, segment in case:
            (folder / name).write_bytes(segment.data)
        forged = any(segment.forged for _, segment in case)
        try:
            first = recover_folder(folder, verify_objects=True)
        except TierError as error:
            return type(error).__name__
        keys = [record.key for segment in first.segments for record in segment.records]
        if len(set(keys)) != len(keys):
            raise Violation("one key was recovered twice")
        for recovered in first.segments:
            fd = os.open(recovered.path, os.O_RDONLY)
            try:
                for record in recovered.records:
                    content = os.pread(fd, record.nbytes, record.offset)
                    if not forged and content not in self._objects.get(record.key, ()):
                        raise Violation("damage was taken for an object")
            finally:
                os.close(fd)
        second = recover_folder(folder, verify_objects=True)
        if second.segments != first.segments or second.damaged:
            raise Violation("recovering again found something else")
        return f"{min(len(keys), 1)}+ objects, {'some' if first.damaged else 'no'} damage"

    def bound(self, case: list[tuple[str, SegmentCase]]) -> int:
        """Allow two pieces of objects for each scanning thread."""
        return (20 << 20) + 4 * sum(len(segment.data) for _, segment in case)
