"""Streams to bytes and back: a header with its chunk table, then 16-byte aligned chunks.

Owns the container that `docs/bitstream.md` specifies, for all profiles. What the plain bytes of a
section mean belongs to each profile's codec.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby, islice
from typing import Any, Protocol

import xxhash

from dynamo_kvtc.codec.entropy import STORE, Buffer, EntropyCoder, batch_of, find_coder
from dynamo_kvtc.codec.geometry import KvGeometry, LayerRange
from dynamo_kvtc.codec.header import (
    ALIGNMENT,
    VERSION,
    Chunk,
    Profile,
    SectionKind,
    StreamHeader,
    align,
    check_dimensions,
    check_header,
    check_num_chunks,
    header_size,
)
from dynamo_kvtc.errors import (
    BadMagicError,
    ChunkChecksumError,
    ChunkTableError,
    EntropyDecodeError,
    HeaderChecksumError,
    ReservedBitsError,
    StreamMismatchError,
    TruncatedStreamError,
    UnsupportedVersionError,
)

__all__ = [
    "MAGIC",
    "Chunk",
    "EncodedChunk",
    "Mapper",
    "Profile",
    "Section",
    "SectionKind",
    "StreamHeader",
    "check_belongs",
    "encode_chunk",
    "encode_chunks",
    "header_size",
    "pack_header",
    "parse_header",
    "peek_profile",
    "read_section",
    "read_sections",
    "write_stream",
]

#: First bytes of every stream; the non-ASCII byte and the line ends show what text-mode copying breaks.
MAGIC = b"\x89KVTC\r\n\x1a"

_DTYPE_CODES = {"bfloat16": 1, "float16": 2, "float32": 3}
_DTYPE_NAMES = {code: name for name, code in _DTYPE_CODES.items()}

_RESERVED_BYTES = 12
_FIXED = struct.Struct(f"<8sHHBBBBIIIIIIQI{_RESERVED_BYTES}s32s32s")
_ENTRY = struct.Struct("<HHBBHQIIQ")
_CHECKSUM = struct.Struct("<Q")
_PROFILE_AT = 12


class Mapper(Protocol):
    """Applies a function to every item, in order: the built-in `map`, or an executor's."""

    def __call__(self, function: Callable[[Any], Any], items: Iterable[Any], /) -> Iterator[Any]:
        """Return the results in the order of `items`."""
        ...


@dataclass(frozen=True, slots=True)
class EncodedChunk:
    """A chunk's stored bytes, before its place in a stream is known."""

    coder_id: int
    plain_size: int
    data: Buffer


_EMPTY_CHUNK = EncodedChunk(STORE, 0, b"")


@dataclass(frozen=True, slots=True)
class Section:
    """One section to write: the encoded chunks of one kind of one layer group.

    No chunks mean an empty payload; the stream marks it with one chunk of no bytes.
    """

    layers: LayerRange
    kind: SectionKind
    chunks: Sequence[EncodedChunk]


def encode_chunk(plain: Buffer, coder: EntropyCoder, runs: Sequence[int] = ()) -> EncodedChunk:
    """Encode one chunk, or store it as it is where the coder does not make it smaller.

    `runs` are as `EntropyCoder.encode_runs` takes them; none mean one.

    Raises
    ------
    SizeLimitError
        If `plain` is longer than the coder's chunks may be.
    """
    return encode_chunks([(plain, runs or (len(plain),))], coder)[0]


def encode_chunks(chunks: Sequence[tuple[Buffer, Sequence[int]]], coder: EntropyCoder) -> list[EncodedChunk]:
    """Encode chunks, each with its runs; see `encode_chunk`."""
    if coder.coder_id == STORE:
        return [EncodedChunk(STORE, len(plain), plain) for plain, _ in chunks]
    return [
        EncodedChunk(coder.coder_id, len(plain), data)
        if len(data) < len(plain)
        else EncodedChunk(STORE, len(plain), plain)
        for (plain, _), data in zip(chunks, coder.encode_many(chunks), strict=True)
    ]


def write_stream(header: StreamHeader, sections: Sequence[Section]) -> bytes:
    """Assemble a stream.

    Parameters
    ----------
    header : StreamHeader
        All fields but `chunks`, which is replaced.
    sections : Sequence[Section]
        In stream order: by layer group, then by ascending kind.

    Raises
    ------
    BitstreamError
        The subclass that names what a reader would refuse.
    """
    pieces = [(section, piece) for section in sections for piece in section.chunks or (_EMPTY_CHUNK,)]
    offset = header_size(len(pieces))
    chunks = []
    for section, piece in pieces:
        size = len(piece.data)
        checksum = xxhash.xxh3_64_intdigest(piece.data)
        chunks.append(
            Chunk(section.layers, section.kind, piece.coder_id, offset, size, piece.plain_size, checksum)
        )
        offset = align(offset + size)
    parts: list[Buffer] = [pack_header(replace(header, chunks=tuple(chunks)))]
    for _, piece in pieces:
        parts += piece.data, bytes(-len(piece.data) % ALIGNMENT)
    return b"".join(parts)


def read_section(
    header: StreamHeader, group: int, kind: SectionKind, payload: Buffer, mapper: Mapper = map
) -> bytearray:
    """Verify and inflate one section of one layer group; see `read_sections`."""
    return read_sections(header, group, (kind,), payload, mapper)[0]


def read_sections(
    header: StreamHeader, group: int, kinds: Sequence[SectionKind], payload: Buffer, mapper: Mapper = map
) -> list[bytearray]:
    """Verify and inflate sections of one layer group.

    Parameters
    ----------
    header : StreamHeader
        As `parse_header` returned it.
    group : int
        Index of the layer group.
    kinds : Sequence[SectionKind]
        Which sections; one that the group does not have reads as empty.
    payload : Buffer
        The stream's bytes ``header.group_span(group)``.
    mapper : Mapper
        Maps over chunks; an executor's `map` inflates them in parallel.

    Returns
    -------
    list[bytearray]
        The sections' payloads, ``header.section_size(group, kind)`` bytes each.

    Raises
    ------
    TruncatedStreamError
        If `payload` is not as long as the layer group's span.
    ChunkChecksumError, ReservedBitsError, UnknownCoderError, EntropyDecodeError
        If a chunk is damaged, its padding is not zero, or it cannot be decoded.
    """
    start, stop = header.group_span(group)
    view = memoryview(payload).cast("B")
    if len(view) != stop - start:
        raise TruncatedStreamError(
            f"layer group {group} spans {stop - start} bytes of the stream, {len(view)} were given"
        )

    def verified(chunk: Chunk) -> memoryview:
        first = chunk.offset - start
        end = first + chunk.stored_size
        stored = view[first:end]
        if xxhash.xxh3_64_intdigest(stored) != chunk.checksum:
            raise ChunkChecksumError(f"the chunk at byte {chunk.offset} is damaged; drop the stream")
        if any(view[end : align(end)]):
            raise ReservedBitsError(f"the padding behind the chunk at byte {chunk.offset} is not zero")
        return stored

    def inflate(chunks: Sequence[Chunk]) -> Sequence[Buffer]:
        return _decode_chunks(chunks, [verified(chunk) for chunk in chunks])

    sections = [header.chunks_of(group, kind) for kind in kinds]
    batches = mapper(inflate, _batches([chunk for chunks in sections for chunk in chunks]))
    plains = chain.from_iterable(batches)
    # Joined rather than filled into buffers of the stated size: memory is spent on decoded bytes alone.
    return [bytearray().join(islice(plains, len(chunks))) for chunks in sections]


def _batches(chunks: Sequence[Chunk]) -> Iterator[Sequence[Chunk]]:
    """Cut chunks into what one call decodes."""
    for coder_id, found in groupby(chunks, key=lambda chunk: chunk.coder_id):
        alike = list(found)
        size = batch_of(coder_id)
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def _decode_chunks(chunks: Sequence[Chunk], stored: Sequence[memoryview]) -> Sequence[Buffer]:
    """Decode chunks of one coder, whose stored bytes are verified."""
    coder_id = chunks[0].coder_id
    if coder_id == STORE:
        return stored
    sizes = [chunk.plain_size for chunk in chunks]
    plains = find_coder(coder_id).decode_many(list(zip(stored, sizes, strict=True)))
    for plain, size in zip(plains, sizes, strict=True):
        if len(plain) != size:
            raise EntropyDecodeError(f"coder {coder_id} returned {len(plain)} of {size} bytes")
    return plains


def parse_header(data: Buffer) -> StreamHeader:
    """Parse and verify a header; `data` starts with it and may go on behind it.

    Raises
    ------
    BadMagicError, UnsupportedVersionError, SizeLimitError, TruncatedStreamError, HeaderChecksumError, \
ReservedBitsError, ChunkTableError
        One for each kind of defect, as `docs/bitstream.md` lists them.
    """
    view = memoryview(data).cast("B")
    magic = bytes(view[: len(MAGIC)])
    if magic != MAGIC[: len(magic)]:
        raise BadMagicError("the bytes are not a KVTC stream: they start with another magic number")
    _check_length(view, _FIXED.size)
    (
        _, version, flags, profile, dtype_code, sink_bits, reserved, plan_id, num_layers, num_kv_heads,
        head_size, num_tokens, sink_tokens, first_position, num_chunks, more_reserved, artifact_id, binding,
    ) = _FIXED.unpack_from(view)  # fmt: skip
    if version != VERSION:
        raise UnsupportedVersionError(f"the stream has version {version}, this reader knows {VERSION}")
    check_num_chunks(num_chunks)
    size = header_size(num_chunks)
    _check_length(view, size)
    checksum_at = _FIXED.size + num_chunks * _ENTRY.size
    if xxhash.xxh3_64_intdigest(view[:checksum_at]) != _CHECKSUM.unpack_from(view, checksum_at)[0]:
        raise HeaderChecksumError("the header or its chunk table is damaged; drop the stream")
    if flags or reserved or any(more_reserved) or any(view[checksum_at + _CHECKSUM.size : size]):
        raise ReservedBitsError("a reserved field or padding byte of the header is not zero")
    check_dimensions(num_layers, num_kv_heads, head_size)
    header = StreamHeader(
        profile=_profile(profile),
        plan_id=plan_id,
        artifact_id=artifact_id,
        geometry=KvGeometry(num_layers, num_kv_heads, head_size, _dtype(dtype_code)),
        first_position=first_position,
        num_tokens=num_tokens,
        sink_tokens=sink_tokens,
        sink_bits=sink_bits,
        binding=binding,
        chunks=tuple(_parse_entries(view[_FIXED.size : checksum_at])),
        version=version,
    )
    check_header(header)
    return header


def peek_profile(data: Buffer) -> int | None:
    """Return the profile's number in a header that nobody has verified yet; None if `data` is too short."""
    view = memoryview(data).cast("B")
    return view[_PROFILE_AT] if len(view) > _PROFILE_AT else None


def pack_header(header: StreamHeader) -> bytes:
    """Return a header's bytes; the inverse of `parse_header`.

    Raises
    ------
    BitstreamError
        The subclass that names what `parse_header` would refuse.
    """
    check_header(header)
    geometry = header.geometry
    packed = bytearray(header.header_size)
    _FIXED.pack_into(
        packed, 0, MAGIC, header.version, 0, header.profile, _DTYPE_CODES[geometry.dtype], header.sink_bits,
        0, header.plan_id, geometry.num_layers, geometry.num_kv_heads, geometry.head_size,
        header.num_tokens, header.sink_tokens, header.first_position, len(header.chunks),
        bytes(_RESERVED_BYTES), header.artifact_id, header.binding,
    )  # fmt: skip
    offset = _FIXED.size
    for chunk in header.chunks:
        _ENTRY.pack_into(
            packed, offset, chunk.layers.first, chunk.layers.count, chunk.kind, chunk.coder_id, 0,
            chunk.offset, chunk.stored_size, chunk.plain_size, chunk.checksum,
        )  # fmt: skip
        offset += _ENTRY.size
    _CHECKSUM.pack_into(packed, offset, xxhash.xxh3_64_intdigest(memoryview(packed)[:offset]))
    return bytes(packed)


def check_belongs(
    header: StreamHeader,
    *,
    profile: Profile,
    artifact_id: bytes,
    geometry: KvGeometry,
    layer_groups: Sequence[LayerRange],
    binding: bytes | None,
) -> None:
    """Check that a sound stream is the one the reader wants; `binding` None accepts any.

    Raises
    ------
    StreamMismatchError
        If it belongs to another profile, artifact, geometry, division into layer groups, or tier key.
    """
    pairs: tuple[tuple[str, object, object], ...] = (
        ("profile", header.profile.name, profile.name),
        ("artifact", header.artifact_id.hex(), artifact_id.hex()),
        ("geometry", header.geometry, geometry),
        ("layer groups", header.layer_groups, tuple(layer_groups)),
        ("binding", header.binding.hex(), header.binding.hex() if binding is None else binding.hex()),
    )
    for name, found, wanted in pairs:
        if found != wanted:
            raise StreamMismatchError(
                f"the stream's {name} is {found}, the reader's {wanted}; treat it as a miss"
            )


def _parse_entries(table: memoryview) -> Iterator[Chunk]:
    for entry in _ENTRY.iter_unpack(table):
        first, count, kind, coder_id, reserved, offset, stored_size, plain_size, checksum = entry
        if reserved:
            raise ReservedBitsError("a reserved field of the chunk table is not zero")
        layers = LayerRange(first, count)
        yield Chunk(layers, _kind(kind), coder_id, offset, stored_size, plain_size, checksum)


def _check_length(view: memoryview, needed: int) -> None:
    if len(view) < needed:
        raise TruncatedStreamError(f"the header needs {needed} bytes, there are {len(view)}; drop the stream")


def _profile(code: int) -> Profile:
    try:
        return Profile(code)
    except ValueError:
        raise UnsupportedVersionError(
            f"the stream has profile {code}, which this reader does not know"
        ) from None


def _dtype(code: int) -> str:
    try:
        return _DTYPE_NAMES[code]
    except KeyError:
        raise UnsupportedVersionError(
            f"the stream has dtype code {code}, which this reader does not know"
        ) from None


def _kind(code: int) -> SectionKind:
    try:
        return SectionKind(code)
    except ValueError:
        raise ChunkTableError(f"a chunk has kind {code}, which the format does not have") from None
