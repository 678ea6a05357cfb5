"""Target ``stream``: header, chunk table and chunks of a stream, down to the plain bytes of its sections."""

from __future__ import annotations

import struct
from pathlib import Path
from random import Random
from typing import NamedTuple

import xxhash

from benchmarks.fuzz.target import Violation, damage, number
from dynamo_kvtc.codec.bitstream import StreamHeader, parse_header, read_section
from dynamo_kvtc.codec.header import CHECKSUM_BYTES, CHUNK_ENTRY_BYTES, FIXED_HEADER_BYTES
from dynamo_kvtc.errors import BitstreamError

__all__ = ["GOLDEN", "StreamCase", "StreamTarget", "num_chunks", "seal_chunks", "seal_header", "sections"]

GOLDEN = Path(__file__).parents[2] / "tests" / "golden"

_COUNT_AT = 48
#: Every field of the fixed header: struct code and position (`docs/bitstream.md`, section 3).
_FIELDS = (("<H", 8), ("<H", 10), ("<B", 12), ("<B", 13), ("<B", 14), ("<B", 15), ("<I", 16), ("<I", 20),
           ("<I", 24), ("<I", 28), ("<I", 32), ("<I", 36), ("<Q", 40), ("<I", 48), ("<I", 52), ("<Q", 64),
           ("<Q", 96))  # fmt: skip
#: Every field of a chunk table's entry.
_ENTRY_FIELDS = (("<H", 0), ("<H", 2), ("<B", 4), ("<B", 5), ("<H", 6), ("<Q", 8), ("<I", 16), ("<I", 20),
                 ("<Q", 24))  # fmt: skip


class StreamCase(NamedTuple):
    """A mutated stream, the golden one it came from, and whether its checksums were made right again."""

    golden: int
    data: bytes
    forged: bool


def num_chunks(data: bytes | bytearray) -> int:
    """Return how many chunks a header says there are; 0 if it is too short to say."""
    if len(data) < FIXED_HEADER_BYTES:
        return 0
    return int(struct.unpack_from("<I", data, _COUNT_AT)[0])


def seal_header(data: bytearray) -> None:
    """Recompute the header's checksum where the number of chunks leaves room for one."""
    end = FIXED_HEADER_BYTES + CHUNK_ENTRY_BYTES * num_chunks(data)
    if FIXED_HEADER_BYTES < end <= len(data) - CHECKSUM_BYTES:
        struct.pack_into("<Q", data, end, xxhash.xxh3_64_intdigest(memoryview(data)[:end]))


def seal_chunks(data: bytearray) -> None:
    """Recompute the checksum of every chunk that the table places inside the stream."""
    view = memoryview(data)
    for index in range(min(num_chunks(data), 64)):
        entry = FIXED_HEADER_BYTES + CHUNK_ENTRY_BYTES * index
        if entry + CHUNK_ENTRY_BYTES > len(data):
            return
        offset, stored = struct.unpack_from("<QI", data, entry + 8)
        if offset + stored <= len(data):
            struct.pack_into("<Q", data, entry + 24, xxhash.xxh3_64_intdigest(view[offset : offset + stored]))


def sections(header: StreamHeader, data: bytes) -> list[bytes]:
    """Return the plain bytes of every section of a stream."""
    found = []
    for group in range(len(header.layer_groups)):
        start, stop = header.group_span(group)
        payload = data[start:stop]
        for kind in dict.fromkeys(chunk.kind for chunk in header.chunks_of(group)):
            plain = bytes(read_section(header, group, kind, payload))
            if len(plain) != header.section_size(group, kind):
                raise Violation(f"{len(plain)} bytes where the table says {header.section_size(group, kind)}")
            found.append(plain)
    return found


class StreamTarget:
    """Mutates golden streams: bytes anywhere, fields, entries, chunks; half of them sealed again."""

    name = "stream"

    def __init__(self) -> None:
        self.golden = [path.read_bytes() for path in sorted(GOLDEN.glob("*.kvtc"))]
        self._headers = [parse_header(data) for data in self.golden]
        self._sections = [
            sections(header, data) for header, data in zip(self._headers, self.golden, strict=True)
        ]

    def make(self, random: Random) -> StreamCase:
        """Return a stream with one to three changes."""
        index = random.randrange(len(self.golden))
        data = bytearray(self.golden[index])
        forged = random.random() < 0.5
        for _ in range(random.choice((1, 1, 1, 2, 3))):
            self.change(random, data)
        if forged:
            if random.random() < 0.7:
                seal_chunks(data)
            seal_header(data)
        return StreamCase(index, bytes(data), forged)

    def change(self, random: Random, data: bytearray) -> None:
        """Change something in a stream."""
        act = random.randrange(6 if len(data) > FIXED_HEADER_BYTES + CHUNK_ENTRY_BYTES else 1)
        if act <= 1:
            damage(random, data, random.choice(self.golden))
        elif act == 2:
            _edit(random, data, 0, _FIELDS)
        elif act == 3:
            entry = random.randrange(min(num_chunks(data), 64) or 1)
            at = FIXED_HEADER_BYTES + CHUNK_ENTRY_BYTES * entry
            if at + CHUNK_ENTRY_BYTES <= len(data):
                _edit(random, data, at, _ENTRY_FIELDS)
        elif act == 4:
            _rearrange(random, data)
        else:
            first = FIXED_HEADER_BYTES + CHUNK_ENTRY_BYTES * min(num_chunks(data), 64)
            if first < len(data):
                for _ in range(random.randrange(1, 5)):
                    data[random.randrange(first, len(data))] = random.randrange(256)

    def judge(self, case: StreamCase) -> str:
        """Read everything; damage must be refused or leave every value as it was."""
        try:
            header = parse_header(case.data)
            found = sections(header, case.data)
        except BitstreamError as error:
            return type(error).__name__
        if header == self._headers[case.golden] and found == self._sections[case.golden]:
            return "unchanged"
        if case.forged:
            return "forged and sound"
        for other, sound in zip(self._headers, self._sections, strict=True):
            # Where all of a stream was overwritten by all of another, its binding tells them apart.
            if (header, found) == (other, sound) and other.binding != self._headers[case.golden].binding:
                return "another whole stream"
        raise Violation("a damaged stream was read as another one")

    def bound(self, case: StreamCase) -> int:
        """Allow some objects for each entry of the table, and twice the sizes it states."""
        try:
            header = parse_header(case.data)
        except BitstreamError:
            plain = 0
        else:
            plain = sum(chunk.plain_size for chunk in header.chunks)
        return (256 << 10) + 32 * len(case.data) + 3 * plain


def _edit(random: Random, data: bytearray, base: int, fields: tuple[tuple[str, int], ...]) -> None:
    form, position = random.choice(fields)
    bits = 8 * struct.calcsize(form)
    if random.random() < 0.5:
        value = number(random, bits)
    else:
        value = struct.unpack_from(form, data, base + position)[0] + random.randint(-17, 17)
    struct.pack_into(form, data, base + position, value % (1 << bits))


def _rearrange(random: Random, data: bytearray) -> None:
    """Exchange, double or drop entries of the chunk table, the count following or not."""
    count = min(num_chunks(data), 64)
    if not count:
        return
    size, base = CHUNK_ENTRY_BYTES, FIXED_HEADER_BYTES
    table = [bytes(data[base + size * i : base + size * (i + 1)]) for i in range(count)]
    one, other, act = random.randrange(count), random.randrange(count), random.randrange(3)
    if act == 0:
        table[one], table[other] = table[other], table[one]
    elif act == 1:
        table.insert(one, table[other])
    else:
        del table[one]
    data[base : base + size * count] = b"".join(table)
    if random.random() < 0.7 and len(data) >= base:
        struct.pack_into("<I", data, _COUNT_AT, len(table))
