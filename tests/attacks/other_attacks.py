"""Hostile segments of a disk tier and configuration files: what each does, and how it must end."""

from __future__ import annotations

import struct
from collections.abc import Callable

import xxhash

from benchmarks.fuzz.segments import make_segment
from dynamo_kvtc.tiers.disk_format import BLOCK_BYTES, SegmentHeader, record_header, segment_header

__all__ = ["CONFIG_ATTACKS", "SEGMENT_ATTACKS"]

_SOUND, _OBJECTS = make_segment(1, 0)
_HEADER = SegmentHeader(1, _SOUND[16:32])
_KEY = bytes(31) + b"\xff"


def _segment(blocks: bytes) -> bytes:
    return segment_header(_HEADER) + blocks.ljust(-(-len(blocks) // BLOCK_BYTES) * BLOCK_BYTES, b"\0")


def _edited_header(form: str, position: int, value: int) -> bytes:
    data = bytearray(segment_header(_HEADER))
    struct.pack_into(form, data, position, value)
    struct.pack_into("<Q", data, 40, xxhash.xxh3_64_intdigest(bytes(data[:40])))
    return bytes(data)


def _record(nbytes: int, content: bytes, *, seed: SegmentHeader = _HEADER) -> bytes:
    return record_header(seed, _KEY, nbytes, xxhash.xxh3_64_intdigest(content)) + content


#: By name: the bytes of ``segment-0000000000000001.kvtc``, and "refused" (`TierError`: the folder is not
#: opened), "removed" (the file holds nothing that is whole), or "dropped" (damaged records are passed over
#: and counted). No attack ever yields an object.
SEGMENT_ATTACKS: dict[str, tuple[Callable[[], bytes], str]] = {
    "version-from-the-future": (lambda: _edited_header("<I", 8, 2), "refused"),
    "reserved-field-used": (lambda: _edited_header("<I", 12, 1), "refused"),
    "header-without-its-checksum": (lambda: _SOUND[:40].ljust(BLOCK_BYTES, b"\0"), "removed"),
    "header-cut-in-the-middle": (lambda: _SOUND[:100], "removed"),
    "another-serial-than-the-name-says": (lambda: _edited_header("<Q", 32, 7), "removed"),
    "nothing-but-zeros": (lambda: bytes(2 * BLOCK_BYTES), "removed"),
    "record-longer-than-the-file": (lambda: _segment(_record(2**40, b"x")), "dropped"),
    "record-of-all-memory": (lambda: _segment(_record(2**64 - 1, b"x")), "dropped"),
    "record-of-no-bytes": (lambda: _segment(_record(0, b"")), "dropped"),
    "record-of-another-segment": (
        lambda: _segment(_record(100, bytes(100), seed=SegmentHeader(1, b"y" * 16))),
        "dropped",
    ),
    "record-whose-bytes-were-never-written": (
        lambda: _segment(
            record_header(_HEADER, _KEY, 5000, xxhash.xxh3_64_intdigest(b"z" * 5000)) + bytes(5000)
        ),
        "dropped",
    ),
    "record-whose-second-half-is-lost": (
        lambda: _segment(
            record_header(_HEADER, _KEY, 5000, xxhash.xxh3_64_intdigest(b"z" * 5000)) + b"z" * 2500
        ),
        "dropped",
    ),
}

_HOST = "tiers:\n  - kind: host\n    capacity: 1GiB\n"

#: By file name: the text, and what one of the problems says.
CONFIG_ATTACKS: dict[str, tuple[str, str]] = {
    "runs-a-command.yaml": (
        'codec: !!python/object/apply:os.system ["true"]\n' + _HOST,
        "tags are not supported",
    ),
    "claims-an-empty-integer.yaml": ("artifact: !!int ''\n" + _HOST, "tags are not supported"),
    "claims-a-timestamp.yaml": ("artifact: !!timestamp x\n" + _HOST, "tags are not supported"),
    "billion-laughs.yaml": (
        "a: &a [x, x, x, x]\nb: &b [*a, *a, *a, *a]\nc: &c [*b, *b, *b, *b]\n" + _HOST,
        "aliases are not supported",
    ),
    "ten-thousand-brackets.yaml": ("codec: " + "[" * 10_000 + "\n", "not valid YAML"),
    "key-that-stands-twice.yaml": (_HOST + "codec: {profile: raw}\ncodec: {profile: kvtc}\n", "stands twice"),
    "key-that-nobody-knows.yaml": (_HOST + "exec: true\n", "unknown key"),
    "number-with-ten-thousand-digits.yaml": ("codec: {ratio: " + "9" * 10_000 + "}\n" + _HOST, "digits"),
    "capacity-of-all-disks.yaml": (_HOST.replace("1GiB", "99999999999999999999TiB"), "more than any machine"),
    "negative-capacity.yaml": (_HOST.replace("1GiB", "-1GiB"), "capacity"),
    "ratio-that-is-not-a-number.yaml": ("codec: {profile: raw, ratio: .nan}\n" + _HOST, "ratio"),
    "deadline-without-end.yaml": (
        "codec: {profile: raw}\ntransfer: {timeout: infs}\n" + _HOST,
        "not a duration",
    ),
    "deadline-of-a-million-years.yaml": (
        "codec: {profile: raw}\ntransfer: {timeout: 9999999999h}\n" + _HOST,
        "deadline",
    ),
    "bytes-that-are-no-text.yaml": ("\x00\x01" + _HOST, "not valid YAML"),
    "nothing.yaml": ("", "must hold keys and values"),
}
