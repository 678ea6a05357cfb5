"""Headers and sections: what is written reads back, and every violation has its own error."""

import struct
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import spec_decoder
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_kvtc.codec import bitstream
from dynamo_kvtc.codec.bitstream import (
    EncodedChunk,
    Profile,
    Section,
    SectionKind,
    StreamHeader,
    check_belongs,
    encode_chunk,
    header_size,
    parse_header,
    read_section,
    write_stream,
)
from dynamo_kvtc.codec.entropy import DEFLATE, MAX_CHUNK_BYTES, STORE, DeflateCoder, StoreCoder
from dynamo_kvtc.codec.geometry import CACHE_DTYPES, KvGeometry, LayerRange
from dynamo_kvtc.codec.header import MAX_CHUNKS, MAX_TOKENS
from dynamo_kvtc.errors import (
    BadMagicError,
    ChunkChecksumError,
    ChunkTableError,
    EntropyDecodeError,
    HeaderChecksumError,
    ReservedBitsError,
    SizeLimitError,
    StreamMismatchError,
    TruncatedStreamError,
    UnknownCoderError,
    UnsupportedVersionError,
)

GEOMETRY = KvGeometry(num_layers=3, num_kv_heads=2, head_size=8)
HEADER = StreamHeader(
    Profile.KVTC, 5, bytes(range(32)), GEOMETRY, first_position=640, num_tokens=20, sink_tokens=4,
    sink_bits=8, binding=bytes(range(32, 64)),
)  # fmt: skip
GROUPS = (LayerRange(0, 2), LayerRange(2, 1))
KINDS = (SectionKind.KEYS, SectionKind.VALUES, SectionKind.SINKS)
PAYLOADS = {
    (0, SectionKind.KEYS): [b"a" * 200, bytes(range(100)), b"xyz"],
    (0, SectionKind.VALUES): [],
    (0, SectionKind.SINKS): [b"s" * 64],
    (1, SectionKind.KEYS): [b"\x01\x02" * 60],
    (1, SectionKind.VALUES): [b"q"],
    (1, SectionKind.SINKS): [b"t" * 33],
}


def sections(payloads=PAYLOADS):
    coder = DeflateCoder()
    return [
        Section(GROUPS[group], kind, [encode_chunk(plain, coder) for plain in plains])
        for (group, kind), plains in payloads.items()
    ]


def stream() -> bytearray:
    return bytearray(write_stream(HEADER, sections()))


def seal(data: bytearray) -> bytearray:
    """Recompute the header's checksum, as an attacker would."""
    (num_chunks,) = struct.unpack_from("<I", data, 48)
    end = 128 + 32 * num_chunks
    struct.pack_into("<Q", data, end, xxhash.xxh3_64_intdigest(bytes(data[:end])))
    return data


def test_fields_have_the_offsets_of_the_specification():
    assert (bitstream._FIXED.size, bitstream._ENTRY.size) == (128, 32)
    data = stream()
    assert data[:8] == b"\x89KVTC\r\n\x1a"
    assert struct.unpack_from("<HHBBBB", data, 8) == (1, 0, 1, 1, 8, 0)
    assert struct.unpack_from("<IIIIIIQI", data, 16) == (5, 3, 2, 8, 20, 4, 640, 8)
    assert data[52:64] == bytes(12)
    assert data[64:128] == bytes(range(64))
    assert struct.unpack_from("<HHBBHQII", data, 128)[:6] == (0, 2, 1, DEFLATE, 0, header_size(8))


def test_header_reads_back_from_the_header_alone():
    data = stream()
    size = header_size(8)
    header = parse_header(data[:size])
    assert header == parse_header(memoryview(data)) == replace(HEADER, chunks=header.chunks)
    assert (header.header_size, header.stream_size) == (size, len(data))
    assert header.layer_groups == GROUPS
    assert header.group_span(0)[0] == size
    assert header.group_span(0)[1] == header.group_span(1)[0]
    assert header.group_span(1)[1] == len(data)
    assert spec_decoder.read_header(bytes(data)).size == size
    assert {chunk.coder_id for chunk in header.chunks} == {STORE, DEFLATE}


@pytest.mark.parametrize("parallel", [False, True])
def test_sections_read_back(parallel):
    data = stream()
    header = parse_header(data)
    with ThreadPoolExecutor(2) as pool:
        for (group, kind), plains in PAYLOADS.items():
            start, stop = header.group_span(group)
            section = read_section(header, group, kind, data[start:stop], pool.map if parallel else map)
            assert section == b"".join(plains)
            assert header.section_size(group, kind) == len(section)
            assert [c.plain_size for c in header.chunks_of(group, kind)] == [len(p) for p in plains] or [0]


@settings(max_examples=50, deadline=None)
@given(
    dtype=st.sampled_from(sorted(CACHE_DTYPES)),
    numbers=st.tuples(*[st.integers(1, 4096)] * 2),
    plan_id=st.integers(0, 2**32 - 1),
    position=st.integers(0, 2**48 - MAX_TOKENS),
    tokens=st.integers(1, MAX_TOKENS),
    sink_bits=st.sampled_from([8, 16]),
    ids=st.tuples(*[st.binary(min_size=32, max_size=32)] * 2),
    groups=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    data=st.data(),
)
def test_every_valid_header_reads_back(
    dtype, numbers, plan_id, position, tokens, sink_bits, ids, groups, data
):
    sinks = data.draw(st.integers(0, tokens))
    geometry = KvGeometry(sum(groups), *numbers, dtype)
    header = StreamHeader(Profile.KVTC, plan_id, ids[0], geometry, position, tokens, sinks, sink_bits, ids[1])
    kinds = KINDS if sinks else KINDS[:2]
    written, first = [], 0
    for count in groups:
        for kind in kinds:
            limit = min(8 * tokens * count * geometry.layer_size, 200)
            plains = data.draw(st.lists(st.binary(min_size=1, max_size=limit // 3 or 1), max_size=3))
            chunks = [encode_chunk(plain, StoreCoder()) for plain in plains]
            written.append(Section(LayerRange(first, count), kind, chunks))
        first += count
    stream = write_stream(header, written)
    parsed = parse_header(stream)
    assert parsed == replace(header, chunks=parsed.chunks)
    assert parsed.stream_size == len(stream)
    assert len(stream) % 16 == 0
    for index, section in enumerate(written):
        group = index // len(kinds)
        start, stop = parsed.group_span(group)
        plain = read_section(parsed, group, section.kind, memoryview(stream)[start:stop])
        assert plain == b"".join(chunk.data for chunk in section.chunks)


def test_a_truncated_header_is_refused():
    for size in range(header_size(8)):
        with pytest.raises(TruncatedStreamError):
            parse_header(stream()[:size])


@pytest.mark.parametrize("bit", range(8))
def test_a_damaged_header_is_refused(bit):
    for position in range(header_size(8)):
        data = stream()
        data[position] ^= 1 << bit
        with pytest.raises(
            (BadMagicError, UnsupportedVersionError, SizeLimitError, TruncatedStreamError,
             HeaderChecksumError, ReservedBitsError)
        ):  # fmt: skip
            parse_header(data)


ENTRY = 128  # of the first chunk; the second begins 32 bytes later
FORGERIES = {
    "magic": ("<B", 1, 0, BadMagicError),
    "version 0": ("<H", 8, 0, UnsupportedVersionError),
    "version 2": ("<H", 8, 2, UnsupportedVersionError),
    "flags": ("<H", 10, 1, ReservedBitsError),
    "profile": ("<B", 12, 3, UnsupportedVersionError),
    "dtype": ("<B", 13, 0, UnsupportedVersionError),
    "sink bits": ("<B", 14, 4, UnsupportedVersionError),
    "reserved byte": ("<B", 15, 1, ReservedBitsError),
    "no layers": ("<I", 20, 0, SizeLimitError),
    "too many layers": ("<I", 20, 4097, SizeLimitError),
    "another number of layers": ("<I", 20, 4, ChunkTableError),
    "no heads": ("<I", 24, 0, SizeLimitError),
    "too many heads": ("<I", 24, 2**32 - 1, SizeLimitError),
    "no head size": ("<I", 28, 0, SizeLimitError),
    "too large a head size": ("<I", 28, 4097, SizeLimitError),
    "no tokens": ("<I", 32, 0, SizeLimitError),
    "too many tokens": ("<I", 32, MAX_TOKENS + 1, SizeLimitError),
    "more sinks than tokens": ("<I", 36, 21, SizeLimitError),
    "sinks without sections of them": ("<I", 36, 0, ChunkTableError),
    "position": ("<Q", 40, 2**48, SizeLimitError),
    "no chunks": ("<I", 48, 0, SizeLimitError),
    "too many chunks": ("<I", 48, MAX_CHUNKS + 1, SizeLimitError),
    "more chunks than bytes": ("<I", 48, MAX_CHUNKS, TruncatedStreamError),
    "reserved bytes": ("<I", 60, 1, ReservedBitsError),
    "a group that starts late": ("<H", ENTRY, 1, ChunkTableError),
    "an empty group": ("<H", ENTRY + 2, 0, ChunkTableError),
    "a group of another length": ("<H", ENTRY + 2, 1, ChunkTableError),
    "unknown kind": ("<B", ENTRY + 4, 9, ChunkTableError),
    "kind of another profile": ("<B", ENTRY + 4, 4, ChunkTableError),
    "kinds out of order": ("<B", ENTRY + 4, 2, ChunkTableError),
    "reserved field of an entry": ("<H", ENTRY + 6, 1, ReservedBitsError),
    "an offset into the header": ("<Q", ENTRY + 8, 0, ChunkTableError),
    "an offset beyond the stream": ("<Q", ENTRY + 8, 2**60, ChunkTableError),
    "an overlap": ("<Q", ENTRY + 40, header_size(8), ChunkTableError),
    "a hole": ("<Q", ENTRY + 40, header_size(8) + 4096, ChunkTableError),
    "a size beyond the stream": ("<I", ENTRY + 16, 2**32 - 1, ChunkTableError),
    "an empty coded chunk": ("<I", ENTRY + 16, 0, ChunkTableError),
    "a chunk that does not shrink": ("<I", ENTRY + 20, 1, ChunkTableError),
    "a DEFLATE chunk over 64 KiB": ("<I", ENTRY + 20, 65_537, SizeLimitError),
    "a stored chunk of another plain size": ("<I", ENTRY + 52, 99, ChunkTableError),
    "a huge stored chunk": ("<I", ENTRY + 52, MAX_CHUNK_BYTES + 1, SizeLimitError),
    "a payload beyond the geometry": ("<I", ENTRY + 20, 60_000, SizeLimitError),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_field_is_refused_with_its_own_error(name):
    form, position, value, error = FORGERIES[name]
    data = stream()
    struct.pack_into(form, data, position, value)
    # "more chunks than bytes" would put the checksum outside the data.
    data = bytes(data if struct.unpack_from("<I", data, 48)[0] > 8 else seal(data))
    with pytest.raises(error):
        parse_header(data)
    with pytest.raises(spec_decoder.SpecError) as by_the_specification:
        spec_decoder.read_header(data)
    assert by_the_specification.value.kind == error.__name__


def test_padding_behind_the_checksum_must_be_zero():
    data = stream()
    data[header_size(8) - 1] = 1
    with pytest.raises(ReservedBitsError):
        parse_header(data)


def test_a_table_whose_groups_leave_layers_out_is_refused():
    with pytest.raises(ChunkTableError, match="2 of 3"):
        write_stream(HEADER, sections()[:3])


def test_an_empty_chunk_beside_others_is_refused():
    empty = encode_chunk(b"", StoreCoder())
    broken = sections()
    broken[0] = replace(broken[0], chunks=[*broken[0].chunks, empty])
    with pytest.raises(ChunkTableError, match="empty"):
        write_stream(HEADER, broken)


@pytest.mark.parametrize(
    "change",
    [{"sink_tokens": 0}, {"num_tokens": 0}, {"first_position": -1}, {"plan_id": 2**32}, {"sink_bits": 4},
     {"binding": b"short"}, {"artifact_id": bytes(33)}],
)  # fmt: skip
def test_the_writer_refuses_what_the_reader_would(change):
    with pytest.raises((SizeLimitError, ChunkTableError, UnsupportedVersionError)):
        write_stream(replace(HEADER, **change), sections())


class TestDamagedChunks:
    def read_all(self, data):
        header = parse_header(data)
        for group in range(2):
            start, stop = header.group_span(group)
            for kind in KINDS:
                read_section(header, group, kind, data[start:stop])

    def test_each_byte_is_guarded(self):
        for position in range(header_size(8), len(stream())):
            data = stream()
            data[position] ^= 0x80
            with pytest.raises((ChunkChecksumError, ReservedBitsError)):
                self.read_all(data)

    def test_a_short_payload_is_refused(self):
        data = stream()
        with pytest.raises(TruncatedStreamError):
            self.read_all(data[:-1])

    def test_bytes_of_another_coder_are_refused(self):
        data = stream()
        header = parse_header(data)
        chunk = header.chunks[0]
        junk = b"\xff" * chunk.stored_size
        data[chunk.offset : chunk.offset + chunk.stored_size] = junk
        struct.pack_into("<Q", data, 128 + 24, xxhash.xxh3_64_intdigest(junk))
        with pytest.raises(EntropyDecodeError):
            self.read_all(seal(data))

    def test_a_plain_size_that_the_chunk_does_not_have_is_refused(self):
        data = stream()
        struct.pack_into("<I", data, 128 + 20, 199)
        with pytest.raises(EntropyDecodeError):
            self.read_all(seal(data))

    def test_an_unknown_coder_is_refused(self):
        data = stream()
        data[128 + 5] = 77
        with pytest.raises(UnknownCoderError, match="77"):
            self.read_all(seal(data))


def test_stated_sizes_alone_cost_no_memory():
    """A table that promises 128 MiB in chunks which hold nothing of it."""
    geometry = KvGeometry(num_layers=1, num_kv_heads=64, head_size=128)
    layers = LayerRange(0, 1)
    hollow = [EncodedChunk(DEFLATE, 65_536, b"\x00" * 8)] * 2048
    header = StreamHeader(Profile.KVTC, 1, bytes(32), geometry, first_position=0, num_tokens=MAX_TOKENS)
    data = write_stream(
        header, [Section(layers, SectionKind.KEYS, hollow), Section(layers, SectionKind.VALUES, [])]
    )
    tracemalloc.start()
    try:
        header = parse_header(data)
        assert header.section_size(0, SectionKind.KEYS) == 128 << 20
        with pytest.raises(EntropyDecodeError):
            read_section(header, 0, SectionKind.KEYS, memoryview(data)[slice(*header.group_span(0))])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


def test_belonging_is_checked_field_by_field():
    header = parse_header(stream())
    wanted = {
        "profile": Profile.KVTC,
        "artifact_id": header.artifact_id,
        "geometry": GEOMETRY,
        "layer_groups": GROUPS,
        "binding": None,
    }
    check_belongs(header, **wanted)
    for name, value in {
        "profile": Profile.RAW,
        "artifact_id": bytes(32),
        "geometry": replace(GEOMETRY, dtype="float32"),
        "layer_groups": (LayerRange(0, 3),),
        "binding": bytes(32),
    }.items():
        with pytest.raises(StreamMismatchError, match=name.split("_")[0]):
            check_belongs(header, **{**wanted, name: value})
