"""The header of a stream: what a reader knows before it reads a chunk, and every rule it must obey.

Owns the words and rules of `docs/bitstream.md`; their bytes belong to `dynamo_kvtc.codec.bitstream`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from itertools import groupby

from dynamo_kvtc.codec.entropy import (
    DEFLATE,
    MAX_CHUNK_BYTES,
    MAX_DEFLATE_CHUNK_BYTES,
    MAX_RANS_CHUNK_BYTES,
    RANS,
    STORE,
)
from dynamo_kvtc.codec.geometry import KvGeometry, LayerRange
from dynamo_kvtc.errors import ChunkTableError, SizeLimitError, UnsupportedVersionError

__all__ = [
    "ALIGNMENT",
    "CHECKSUM_BYTES",
    "CHUNK_ENTRY_BYTES",
    "FIXED_HEADER_BYTES",
    "ID_BYTES",
    "MAX_CHUNKS",
    "MAX_DIMENSION",
    "MAX_POSITION",
    "MAX_TOKENS",
    "SINK_BITS",
    "VERSION",
    "Chunk",
    "Profile",
    "SectionKind",
    "StreamHeader",
    "align",
    "check_dimensions",
    "check_header",
    "check_num_chunks",
    "header_size",
]

VERSION = 1

#: Header, chunks and stream end at multiples of this many bytes.
ALIGNMENT = 16

#: Bytes of the header before its chunk table, of one entry of the table, and of the checksum behind it.
FIXED_HEADER_BYTES = 128
CHUNK_ENTRY_BYTES = 32
CHECKSUM_BYTES = 8

#: Bytes of an artifact id and of a binding.
ID_BYTES = 32

#: Largest plain chunks of coders that have limits of their own.
_LIMITS = {DEFLATE: MAX_DEFLATE_CHUNK_BYTES, RANS: MAX_RANS_CHUNK_BYTES}

#: Largest number of chunks in a stream.
MAX_CHUNKS = 65_536

#: Largest number of tokens in a stream.
MAX_TOKENS = 65_536

#: Largest number of layers, of KV heads, and largest head size.
MAX_DIMENSION = 4_096

#: Largest position one past the last token.
MAX_POSITION = 1 << 48

#: Bits that an element of a sink token may take: 8 is scaled E4M3FN, 16 is the cache's own dtype.
SINK_BITS = (8, 16)

#: Largest payload of a section, in bytes per token and element of a layer group's keys: raw float32
#: keys and values take all of it.
_MAX_BYTES_PER_ELEMENT = 8


class Profile(IntEnum):
    """How a stream's payloads are made; the number is the id in the header."""

    RAW = 0
    KVTC = 1
    RD = 2


class SectionKind(IntEnum):
    """What a chunk holds a piece of; sections of a layer group are stored in ascending order."""

    KEYS = 1
    VALUES = 2
    SINKS = 3
    RAW = 4


@dataclass(frozen=True, slots=True)
class Chunk:
    """One row of the chunk table.

    Attributes
    ----------
    layers : LayerRange
        The layer group that the chunk belongs to.
    kind : SectionKind
        The section that the chunk is a piece of.
    coder_id : int
        Entropy coder of the stored bytes.
    offset : int
        First stored byte, counted from the start of the stream.
    stored_size, plain_size : int
        Bytes in the stream, and bytes after entropy decoding.
    checksum : int
        XXH3-64 of the stored bytes.
    """

    layers: LayerRange
    kind: SectionKind
    coder_id: int
    offset: int
    stored_size: int
    plain_size: int
    checksum: int


@dataclass(frozen=True)
class StreamHeader:
    """Everything that is known about a stream before one of its chunks is read.

    Attributes
    ----------
    profile : Profile
        How the payloads are made.
    plan_id : int
        Bit plan of the artifact, 0 to 2**32 - 1; 0 in profiles without plans.
    artifact_id, binding : bytes
        `ID_BYTES` bytes each: the parameters the stream needs, and the tier key it was stored under.
    geometry : KvGeometry
        Shape and dtype of the cache.
    first_position, num_tokens : int
        The tokens at positions ``first_position .. first_position + num_tokens - 1``.
    sink_tokens, sink_bits : int
        How many leading tokens are kept apart at high precision, and the bits of each of their elements.
    chunks : tuple[Chunk, ...]
        The chunk table, in stream order; empty only until the stream is written.
    version : int
        Format version.
    """

    profile: Profile
    plan_id: int
    artifact_id: bytes
    geometry: KvGeometry
    first_position: int
    num_tokens: int
    sink_tokens: int = 0
    sink_bits: int = 16
    binding: bytes = bytes(ID_BYTES)
    chunks: tuple[Chunk, ...] = ()
    version: int = VERSION

    @property
    def header_size(self) -> int:
        """Bytes of the header with its chunk table: the offset of the first chunk."""
        return header_size(len(self.chunks))

    @cached_property
    def stream_size(self) -> int:
        """Bytes of the whole stream."""
        last = self.chunks[-1]
        return align(last.offset + last.stored_size)

    @cached_property
    def layer_groups(self) -> tuple[LayerRange, ...]:
        """The layer groups in layer order."""
        return tuple(layers for layers, _ in groupby(self.chunks, key=lambda chunk: chunk.layers))

    @cached_property
    def _chunks_by_group(self) -> tuple[tuple[Chunk, ...], ...]:
        return tuple(tuple(chunks) for _, chunks in groupby(self.chunks, key=lambda chunk: chunk.layers))

    def group_span(self, group: int) -> tuple[int, int]:
        """Return the half-open byte range of a layer group's chunks in the stream."""
        chunks = self._chunks_by_group[group]
        return chunks[0].offset, align(chunks[-1].offset + chunks[-1].stored_size)

    def chunks_of(self, group: int, kind: SectionKind | None = None) -> tuple[Chunk, ...]:
        """Return the chunks of one section of a layer group in order, or of all its sections."""
        chunks = self._chunks_by_group[group]
        return chunks if kind is None else tuple(chunk for chunk in chunks if chunk.kind is kind)

    def section_size(self, group: int, kind: SectionKind) -> int:
        """Return the payload bytes of one section after entropy decoding."""
        return sum(chunk.plain_size for chunk in self.chunks_of(group, kind))


def header_size(num_chunks: int) -> int:
    """Return the bytes of a header whose table has `num_chunks` chunks."""
    return align(FIXED_HEADER_BYTES + num_chunks * CHUNK_ENTRY_BYTES + CHECKSUM_BYTES)


def align(size: int) -> int:
    """Return `size` rounded up to a multiple of `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def check_dimensions(num_layers: int, num_kv_heads: int, head_size: int) -> None:
    """Check the bounds of a geometry's numbers.

    Raises
    ------
    SizeLimitError
        If one of them is zero or beyond `MAX_DIMENSION`.
    """
    _check_range("number of layers", num_layers, 1, MAX_DIMENSION)
    _check_range("number of KV heads", num_kv_heads, 1, MAX_DIMENSION)
    _check_range("head size", head_size, 1, MAX_DIMENSION)


def check_num_chunks(num_chunks: int) -> None:
    """Check the bounds of a chunk table, before anything is read from it.

    Raises
    ------
    SizeLimitError
        If there is no chunk, or more than `MAX_CHUNKS`.
    """
    _check_range("number of chunks", num_chunks, 1, MAX_CHUNKS)


def check_header(header: StreamHeader) -> None:
    """Check every rule of the format that a header and its chunk table can break.

    Raises
    ------
    SizeLimitError
        If a number is beyond its bound.
    ChunkTableError
        If chunks overlap, leave holes, or do not cover the layers and sections that there must be.
    UnsupportedVersionError
        If the sinks have a number of bits that this version does not know.
    """
    _check_fields(header)
    _check_table(header)


def _check_fields(header: StreamHeader) -> None:
    """Check every field of the header apart from the chunk table."""
    geometry = header.geometry
    check_dimensions(geometry.num_layers, geometry.num_kv_heads, geometry.head_size)
    _check_range("number of tokens", header.num_tokens, 1, MAX_TOKENS)
    _check_range("number of sink tokens", header.sink_tokens, 0, header.num_tokens)
    _check_range("first position", header.first_position, 0, MAX_POSITION - header.num_tokens)
    _check_range("plan id", header.plan_id, 0, 0xFFFF_FFFF)
    check_num_chunks(len(header.chunks))
    _check_range("bytes of the artifact id", len(header.artifact_id), ID_BYTES, ID_BYTES)
    _check_range("bytes of the binding", len(header.binding), ID_BYTES, ID_BYTES)
    if header.sink_bits not in SINK_BITS:
        raise UnsupportedVersionError(f"sinks have {header.sink_bits} bits; this reader knows {SINK_BITS}")


def _check_table(header: StreamHeader) -> None:
    """Check the chunk table: bounds of each chunk, then order and coverage of groups and sections."""
    offset = header.header_size
    for chunk in header.chunks:
        _check_chunk(chunk)
        if chunk.offset != offset:
            raise ChunkTableError(f"a chunk starts at byte {chunk.offset} instead of {offset}")
        offset = align(offset + chunk.stored_size)
    kinds = _required_kinds(header)
    layer = 0
    for group, layers in enumerate(header.layer_groups):
        if layers.first != layer or layers.count < 1:
            raise ChunkTableError(
                f"a layer group has layers {layers.first} to {layers.stop - 1}; layer {layer} must come next"
            )
        layer = layers.stop
        found = tuple(kind for kind, _ in groupby(header.chunks_of(group), key=lambda chunk: chunk.kind))
        if found != kinds:
            names = [kind.name for kind in kinds]
            raise ChunkTableError(f"the layer group at layer {layers.first} must have the sections {names}")
        elements = header.num_tokens * layers.count * header.geometry.layer_size
        for kind in kinds:
            _check_section(header.chunks_of(group, kind), _MAX_BYTES_PER_ELEMENT * elements)
    if layer != header.geometry.num_layers:
        raise ChunkTableError(f"the chunks cover {layer} of {header.geometry.num_layers} layers")


def _required_kinds(header: StreamHeader) -> tuple[SectionKind, ...]:
    if header.profile is Profile.RAW:
        return (SectionKind.RAW,)
    if header.sink_tokens:
        return SectionKind.KEYS, SectionKind.VALUES, SectionKind.SINKS
    return SectionKind.KEYS, SectionKind.VALUES


def _check_chunk(chunk: Chunk) -> None:
    limit = _LIMITS.get(chunk.coder_id, MAX_CHUNK_BYTES)
    _check_range("plain size of a chunk", chunk.plain_size, 0, limit)
    if chunk.coder_id == STORE:
        if chunk.stored_size != chunk.plain_size:
            raise ChunkTableError(f"an uncoded chunk takes {chunk.stored_size} bytes for {chunk.plain_size}")
    elif not 0 < chunk.stored_size < chunk.plain_size:
        raise ChunkTableError(
            f"a chunk of coder {chunk.coder_id} takes {chunk.stored_size} bytes for {chunk.plain_size}"
        )


def _check_section(chunks: Sequence[Chunk], limit: int) -> None:
    _check_range("payload of a section", sum(chunk.plain_size for chunk in chunks), 0, limit)
    if len(chunks) > 1 and any(chunk.plain_size == 0 for chunk in chunks):
        raise ChunkTableError("an empty chunk stands beside others in its section")


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise SizeLimitError(f"the stream's {name} is {value}; the format allows {low} to {high}")
