"""Hostile streams: what each file does, and the error it must meet. Written by ``make_attacks.py``."""

from __future__ import annotations

import struct
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import xxhash

sys.path.append(str(Path(__file__).parents[1] / "codec"))

from golden_files import GOLDEN

from benchmarks.fuzz.streams import seal_chunks, seal_header, sections
from dynamo_kvtc.codec.bitstream import EncodedChunk, Section, SectionKind, parse_header, write_stream
from dynamo_kvtc.codec.entropy import DEFLATE, RANS
from dynamo_kvtc.codec.header import CHUNK_ENTRY_BYTES, FIXED_HEADER_BYTES
from dynamo_kvtc.errors import (
    BadMagicError,
    BitstreamError,
    ChunkChecksumError,
    ChunkTableError,
    EntropyDecodeError,
    HeaderChecksumError,
    PayloadError,
    ReservedBitsError,
    SizeLimitError,
    StreamMismatchError,
    TruncatedStreamError,
    UnknownCoderError,
    UnsupportedVersionError,
)

__all__ = ["BASE", "STREAM_ATTACKS"]

#: The sound stream that all attacks but a few are made of: two layer groups, three sections each.
BASE = "groups.plan7-sinks8"
_SOUND = (GOLDEN / f"{BASE}.kvtc").read_bytes()
_HEADER = parse_header(_SOUND)

#: Attack by file name: how it is made, and how it must end.
STREAM_ATTACKS: dict[str, tuple[Callable[[], bytes], type[BitstreamError]]] = {}


def attack(error: type[BitstreamError]) -> Callable[[Callable[[], bytes]], Callable[[], bytes]]:
    """Register a function as the attack of its name."""

    def register(make: Callable[[], bytes]) -> Callable[[], bytes]:
        STREAM_ATTACKS[make.__name__.replace("_", "-") + ".kvtc"] = (make, error)
        return make

    return register


def edited(form: str, position: int, value: int, *, sealed: bool = True, chunks: bool = False) -> bytes:
    """The sound stream with one field changed, under right checksums unless they are the point."""
    data = bytearray(_SOUND)
    struct.pack_into(form, data, position, value)
    if chunks:
        seal_chunks(data)
    if sealed:
        seal_header(data)
    return bytes(data)


def entry(index: int, form: str, position: int, value: int) -> bytes:
    """The sound stream with one field of one entry of its chunk table changed."""
    return edited(form, FIXED_HEADER_BYTES + CHUNK_ENTRY_BYTES * index + position, value)


def with_section(group: int, kind: SectionKind, chunks: list[EncodedChunk]) -> bytes:
    """The sound stream with the chunks of one section replaced."""
    plains = iter(sections(_HEADER, _SOUND))
    made = []
    for number, layers in enumerate(_HEADER.layer_groups):
        for found in dict.fromkeys(chunk.kind for chunk in _HEADER.chunks_of(number)):
            plain = next(plains)
            own = [EncodedChunk(0, len(plain), plain)]
            made.append(Section(layers, found, chunks if (number, found) == (group, kind) else own))
    return write_stream(_HEADER, made)


def deflated(plain: bytes) -> bytes:
    compress = zlib.compressobj(9, zlib.DEFLATED, -15)
    return compress.compress(plain) + compress.flush()


def plain_keys() -> bytes:
    return sections(_HEADER, _SOUND)[0]


# --- not a stream, or only a part of one ---------------------------------------------------------------


@attack(TruncatedStreamError)
def empty_file() -> bytes:
    return b""


@attack(TruncatedStreamError)
def nothing_but_the_magic() -> bytes:
    return _SOUND[:8]


@attack(TruncatedStreamError)
def ends_inside_the_table() -> bytes:
    return _SOUND[: FIXED_HEADER_BYTES + CHUNK_ENTRY_BYTES]


@attack(TruncatedStreamError)
def ends_inside_the_last_chunk() -> bytes:
    return _SOUND[:-20]


@attack(BadMagicError)
def a_gzip_file() -> bytes:
    return zlib.compress(_SOUND, wbits=31)


@attack(BadMagicError)
def line_ends_changed_by_a_text_mode_copy() -> bytes:
    return _SOUND.replace(b"\r\n", b"\n")


@attack(TruncatedStreamError)
def promises_65536_chunks_in_one_kilobyte() -> bytes:
    return edited("<I", 48, 65_536, sealed=False)


# --- the fixed header ------------------------------------------------------------------------------------


@attack(HeaderChecksumError)
def one_bit_of_the_header_flipped() -> bytes:
    return edited("<B", 40, _SOUND[40] ^ 1, sealed=False)


@attack(UnsupportedVersionError)
def version_from_the_future() -> bytes:
    return edited("<H", 8, 2)


@attack(UnsupportedVersionError)
def profile_of_nobody() -> bytes:
    return edited("<B", 12, 200)


@attack(UnsupportedVersionError)
def dtype_of_nobody() -> bytes:
    return edited("<B", 13, 9)


@attack(UnsupportedVersionError)
def sinks_of_five_bits() -> bytes:
    return edited("<B", 14, 5)


@attack(ReservedBitsError)
def flag_that_nobody_defined() -> bytes:
    return edited("<H", 10, 1)


@attack(ReservedBitsError)
def message_in_the_reserved_bytes() -> bytes:
    return edited("<Q", 52, int.from_bytes(b"smuggled", "little"))


@attack(SizeLimitError)
def four_billion_chunks() -> bytes:
    return edited("<I", 48, 2**32 - 1)


@attack(SizeLimitError)
def no_chunks() -> bytes:
    return edited("<I", 48, 0)


@attack(SizeLimitError)
def four_billion_layers() -> bytes:
    return edited("<I", 20, 2**32 - 1)


@attack(SizeLimitError)
def four_billion_tokens() -> bytes:
    return edited("<I", 32, 2**32 - 1)


@attack(SizeLimitError)
def no_tokens() -> bytes:
    return edited("<I", 32, 0)


@attack(SizeLimitError)
def heads_of_no_size() -> bytes:
    return edited("<I", 28, 0)


@attack(SizeLimitError)
def more_sinks_than_tokens() -> bytes:
    return edited("<I", 36, _HEADER.num_tokens + 1)


@attack(SizeLimitError)
def position_beyond_all_bounds() -> bytes:
    return edited("<Q", 40, 2**64 - 1)


@attack(UnsupportedVersionError)
def plan_that_the_artifact_does_not_have() -> bytes:
    return edited("<I", 16, 4_000_000_000)


@attack(StreamMismatchError)
def of_another_artifact() -> bytes:
    return edited("<Q", 64, 1)


@attack(StreamMismatchError)
def stored_under_another_key() -> bytes:
    return edited("<Q", 96, 1)


@attack(StreamMismatchError)
def of_another_head_size() -> bytes:
    return edited("<I", 28, _HEADER.geometry.head_size * 2)


@attack(StreamMismatchError)
def of_another_profile() -> bytes:
    return edited("<B", 12, 2)


# --- the chunk table -----------------------------------------------------------------------------------


@attack(ReservedBitsError)
def reserved_field_of_an_entry_used() -> bytes:
    return entry(0, "<H", 6, 1)


@attack(ChunkTableError)
def two_chunks_share_their_bytes() -> bytes:
    return entry(1, "<Q", 8, _HEADER.chunks[0].offset)


@attack(ChunkTableError)
def hole_between_two_chunks() -> bytes:
    return entry(1, "<Q", 8, _HEADER.chunks[1].offset + 16)


@attack(ChunkTableError)
def chunk_at_the_end_of_the_address_space() -> bytes:
    return entry(1, "<Q", 8, 2**64 - 16)


@attack(ChunkTableError)
def chunk_that_is_the_header_itself() -> bytes:
    return entry(0, "<Q", 8, 0)


@attack(ChunkTableError)
def kind_of_nobody() -> bytes:
    return entry(0, "<B", 4, 77)


@attack(ChunkTableError)
def values_before_keys() -> bytes:
    data = bytearray(_SOUND)
    kinds = [chunk.kind for chunk in _HEADER.chunks[:2]]
    for index, kind in enumerate(reversed(kinds)):
        data[FIXED_HEADER_BYTES + CHUNK_ENTRY_BYTES * index + 4] = kind
    seal_header(data)
    return bytes(data)


@attack(ChunkTableError)
def a_layer_missing() -> bytes:
    first = _HEADER.chunks_of(0)
    data = bytearray(_SOUND)
    for index in range(len(first)):
        struct.pack_into(
            "<H", data, FIXED_HEADER_BYTES + CHUNK_ENTRY_BYTES * index + 2, first[0].layers.count - 1
        )
    seal_header(data)
    return bytes(data)


@attack(ChunkTableError)
def a_layer_in_two_groups() -> bytes:
    data = bytearray(_SOUND)
    for index, chunk in enumerate(_HEADER.chunks):
        if chunk in _HEADER.chunks_of(1):
            struct.pack_into(
                "<H", data, FIXED_HEADER_BYTES + CHUNK_ENTRY_BYTES * index, chunk.layers.first - 1
            )
    seal_header(data)
    return bytes(data)


@attack(ChunkTableError)
def deflate_that_does_not_shrink() -> bytes:
    data = bytearray(_SOUND)
    index = next(i for i, chunk in enumerate(_HEADER.chunks) if chunk.coder_id == 0)
    data[FIXED_HEADER_BYTES + CHUNK_ENTRY_BYTES * index + 5] = DEFLATE
    seal_header(data)
    return bytes(data)


@attack(SizeLimitError)
def plain_size_of_four_gigabytes() -> bytes:
    data = bytearray(_SOUND)
    base = FIXED_HEADER_BYTES
    struct.pack_into("<B", data, base + 5, DEFLATE)
    struct.pack_into("<I", data, base + 20, 2**32 - 1)
    seal_header(data)
    return bytes(data)


@attack(SizeLimitError)
def section_larger_than_raw_kv() -> bytes:
    data = bytearray(_SOUND)
    base = FIXED_HEADER_BYTES
    struct.pack_into("<B", data, base + 5, 128)
    struct.pack_into("<I", data, base + 20, 16 << 20)
    seal_header(data)
    return bytes(data)


@attack(UnknownCoderError)
def coder_of_nobody() -> bytes:
    data = bytearray(with_section(0, SectionKind.KEYS, [EncodedChunk(DEFLATE, len(plain_keys()), b"x" * 16)]))
    data[FIXED_HEADER_BYTES + 5] = 77
    seal_header(data)
    return bytes(data)


# --- chunks ----------------------------------------------------------------------------------------------


@attack(ChunkChecksumError)
def one_bit_of_a_chunk_flipped() -> bytes:
    at = _HEADER.chunks[-1].offset
    return edited("<B", at, _SOUND[at] ^ 0x80, sealed=False)


@attack(ChunkChecksumError)
def second_half_of_a_chunk_never_written() -> bytes:
    chunk = max(_HEADER.chunks, key=lambda chunk: chunk.stored_size)
    data = bytearray(_SOUND)
    half, stop = chunk.offset + chunk.stored_size // 2, chunk.offset + chunk.stored_size
    data[half:stop] = bytes(stop - half)
    return bytes(data)


@attack(ReservedBitsError)
def message_in_the_padding_of_a_chunk() -> bytes:
    chunk = next(chunk for chunk in _HEADER.chunks if chunk.stored_size % 16)
    return edited("<B", chunk.offset + chunk.stored_size, 1, sealed=False)


@attack(EntropyDecodeError)
def sixty_four_kilobytes_out_of_a_chunk_that_states_less() -> bytes:
    bomb = deflated(bytes(64 << 10))
    return with_section(0, SectionKind.KEYS, [EncodedChunk(DEFLATE, len(plain_keys()), bomb)])


@attack(EntropyDecodeError)
def deflate_that_ends_early() -> bytes:
    return with_section(0, SectionKind.KEYS, [EncodedChunk(DEFLATE, len(plain_keys()), deflated(b"short"))])


@attack(EntropyDecodeError)
def deflate_with_bytes_behind_its_end() -> bytes:
    zeros = bytes(len(plain_keys()))
    return with_section(0, SectionKind.KEYS, [EncodedChunk(DEFLATE, len(zeros), deflated(zeros) + b"more")])


@attack(EntropyDecodeError)
def deflate_block_of_a_reserved_type() -> bytes:
    return with_section(0, SectionKind.KEYS, [EncodedChunk(DEFLATE, len(plain_keys()), b"\x07" + bytes(8))])


@attack(EntropyDecodeError)
def deflate_that_reaches_back_before_its_start() -> bytes:
    # A fixed block whose first symbol is a match of length 3 at distance 1.
    bits = "1" + "10" + "0000001" + "00000" + "0000000"
    packed = int(bits[::-1], 2).to_bytes(-(-len(bits) // 8), "little")
    return with_section(0, SectionKind.KEYS, [EncodedChunk(DEFLATE, len(plain_keys()), packed + b"\0" * 4)])


def with_rans(data: bytes) -> bytes:
    return with_section(0, SectionKind.KEYS, [EncodedChunk(RANS, len(plain_keys()), data)])


@attack(EntropyDecodeError)
def rans_of_seventeen_tables() -> bytes:
    return with_rans(b"\x11\0" + struct.pack("<16H", *[1] * 16) + bytes(40))


@attack(EntropyDecodeError)
def rans_whose_symbols_weigh_nothing() -> bytes:
    return with_rans(b"\1\0" + struct.pack("<HHBB", 1, 0b11, 0x11, 0) + bytes(40))


@attack(EntropyDecodeError)
def rans_table_longer_than_its_chunk() -> bytes:
    return with_rans(b"\1\0" + b"\xff" * 100)


@attack(EntropyDecodeError)
def rans_of_more_steps_than_bytes() -> bytes:
    table = struct.pack("<HHBB", 1, 1, 15, 0)
    return with_rans(b"\2\0\xff\xff" + table * 2 + bytes(40))


@attack(EntropyDecodeError)
def rans_that_ends_before_its_states() -> bytes:
    return with_rans(b"\1\0" + struct.pack("<HHBB", 1, 1, 15, 0) + b"\0\0\1\0" * 20)


@attack(ChunkTableError)
def payload_one_byte_short() -> bytes:
    plain = plain_keys()[:-1]
    return with_section(0, SectionKind.KEYS, [EncodedChunk(0, len(plain), plain)])


@attack(ChunkTableError)
def payload_of_no_bytes() -> bytes:
    return with_section(0, SectionKind.KEYS, [])


@attack(PayloadError)
def scales_that_are_not_a_number() -> bytes:
    plain = b"\xff" * len(plain_keys())
    return with_section(0, SectionKind.KEYS, [EncodedChunk(0, len(plain), plain)])


@attack(ReservedBitsError)
def header_padding_with_a_message() -> bytes:
    data = bytearray(_SOUND)
    end = FIXED_HEADER_BYTES + CHUNK_ENTRY_BYTES * len(_HEADER.chunks) + 8
    assert end < _HEADER.header_size
    data[end] = 1
    return bytes(data)


@attack(SizeLimitError)
def sum_of_chunks_beyond_the_section() -> bytes:
    limit = 8 * _HEADER.num_tokens * _HEADER.geometry.layer_size * _HEADER.layer_groups[0].count
    count = limit // (64 << 10) + 1
    plain = bytes(64 << 10)
    stored = deflated(plain)
    keys = _HEADER.chunks_of(0, SectionKind.KEYS)[0]
    rest = [chunk for chunk in _HEADER.chunks if chunk is not keys]
    bomb = [
        replace(keys, coder_id=DEFLATE, stored_size=len(stored), plain_size=len(plain),
                checksum=xxhash.xxh3_64_intdigest(stored))
    ] * count  # fmt: skip
    return _assemble([(chunk, stored) for chunk in bomb] + [(chunk, _bytes_of(chunk)) for chunk in rest])


def _bytes_of(chunk) -> bytes:
    return _SOUND[chunk.offset : chunk.offset + chunk.stored_size]


def _assemble(chunks) -> bytes:
    """A stream of these chunks whatever the rules say, which `write_stream` would not write."""
    data = bytearray(_SOUND[:FIXED_HEADER_BYTES])
    struct.pack_into("<I", data, 48, len(chunks))
    size = FIXED_HEADER_BYTES + CHUNK_ENTRY_BYTES * len(chunks) + 8
    offset = -(-size // 16) * 16
    body = b""
    for chunk, stored in chunks:
        data += struct.pack(
            "<HHBBHQIIQ", chunk.layers.first, chunk.layers.count, chunk.kind, chunk.coder_id, 0,
            offset + len(body), chunk.stored_size, chunk.plain_size, chunk.checksum,
        )  # fmt: skip
        body += stored + bytes(-len(stored) % 16)
    data += bytes(offset - len(data))
    seal_header(data)
    return bytes(data) + body
