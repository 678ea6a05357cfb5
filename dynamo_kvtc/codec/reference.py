"""The kvtc profile once more, slow and obvious: the yardstick of the fast codec.

Plain loops in float64 over tokens, groups and symbols (`dynamo_kvtc.codec.reference_steps`), with zlib
from the standard library. It shares the container (`dynamo_kvtc.codec.bitstream`) and the dataclasses
with `dynamo_kvtc.codec.kvtc`, and nothing else. From the same coefficients both make the same payload,
bit for bit; each decodes the other's streams. `dynamo_kvtc.codec.rd_reference` changes what is different
in the rd profile.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from dynamo_kvtc.codec.base import Buffer, KvCodec, TierBlock
from dynamo_kvtc.codec.bitstream import (
    EncodedChunk,
    Profile,
    Section,
    SectionKind,
    StreamHeader,
    check_belongs,
    header_size,
    parse_header,
    read_section,
    write_stream,
)
from dynamo_kvtc.codec.entropy import DEFLATE, STORE
from dynamo_kvtc.codec.header import align
from dynamo_kvtc.codec.parameters import AnyParameters
from dynamo_kvtc.codec.reference_steps import (
    Array,
    pack_coefficients,
    pack_sinks,
    project,
    reconstruct,
    rotate,
    unpack_coefficients,
    unpack_sinks,
)
from dynamo_kvtc.errors import ChunkTableError, EncodeRangeError, UnsupportedVersionError

__all__ = ["ReferenceCodec"]

_CHUNK_BYTES = 65_536


@dataclass(frozen=True, eq=False)
class _ReferenceGroup:
    """A layer group decoded to the end: keys and values ``[tokens, layers, heads, head_size]``."""

    group: int
    keys: torch.Tensor
    values: torch.Tensor


class ReferenceCodec(KvCodec):
    """The kvtc profile by `KvCodec`'s contract, for tests and for readers.

    Parameters
    ----------
    parameters : AnyParameters
        Transforms and plans, from an artifact.
    ratio : float
        Nominal ratio of the plan to encode with.
    sink_bits : int
        Bits of an element of a sink token, 8 or 16.
    """

    profile: ClassVar[Profile] = Profile.KVTC

    def __init__(self, parameters: AnyParameters, *, ratio: float, sink_bits: int = 8) -> None:
        self.parameters = parameters
        self.geometry = parameters.geometry
        self.layer_groups = tuple(group.layers for group in parameters.groups)
        self._plan_id = parameters.plan_id(ratio)
        self._sink_bits = sink_bits

    def header_bytes(self, num_tokens: int, sink_tokens: int) -> int:
        """Return the exact size of a stream's header with its chunk table."""
        sections = self._largest_sections(self._plan_id, num_tokens, sink_tokens, self._sink_bits)
        return header_size(sum(max(1, len(chunks)) for _, chunks in sections.values()))

    def max_stream_bytes(self, num_tokens: int, sink_tokens: int) -> int:
        """Return an upper bound of a stream's size."""
        sections = self._largest_sections(self._plan_id, num_tokens, sink_tokens, self._sink_bits)
        sizes = (align(size) for _, chunks in sections.values() for size in chunks)
        return self.header_bytes(num_tokens, sink_tokens) + sum(sizes)

    def encode(self, blocks: Sequence[TierBlock]) -> list[bytes]:
        """Encode tier blocks, one stream each; see `KvCodec.encode`."""
        return [self._encode_block(block) for block in blocks]

    def read_header(self, data: Buffer, *, binding: bytes | None = None) -> StreamHeader:
        """Parse and verify a header; see `KvCodec.read_header`."""
        header = parse_header(data)
        check_belongs(
            header,
            profile=self.profile,
            artifact_id=self.parameters.artifact_id,
            geometry=self.geometry,
            layer_groups=self.layer_groups,
            binding=binding,
        )
        if header.plan_id not in self.parameters.ratios:
            raise UnsupportedVersionError(f"the artifact has no bit plan {header.plan_id}")
        sections = self._largest_sections(
            header.plan_id, header.num_tokens, header.sink_tokens, header.sink_bits
        )
        for (group, kind), (least, chunks) in sections.items():
            if not least <= header.section_size(group, kind) <= sum(chunks):
                raise ChunkTableError(
                    f"the {kind.name} of layer group {group} do not have {least} to {sum(chunks)} bytes"
                )
        return header

    def open_group(self, header: StreamHeader, group: int, payload: Buffer) -> _ReferenceGroup:
        """Decode one layer group of one stream; see `KvCodec.open_group`."""
        geometry, layers, parameters = self.geometry, self.layer_groups[group], self.parameters.groups[group]
        coded = header.num_tokens - header.sink_tokens
        sides = []
        for kind, side in ((SectionKind.KEYS, parameters.keys), (SectionKind.VALUES, parameters.values)):
            section = bytes(read_section(header, group, kind, payload))
            rows = self._decode_side(section, side, header.plan_id, coded)
            sides.append(rows.reshape(coded, layers.count, geometry.num_kv_heads, geometry.head_size))
        first = header.first_position + header.sink_tokens
        sides[0] = rotate(sides[0], range(first, first + coded), self.parameters.rope, undo=False)
        if geometry.dtype == "float16":
            sides = [np.clip(side, -65_504, 65_504) for side in sides]
        keys, values = (torch.from_numpy(side).to(geometry.torch_dtype) for side in sides)
        if header.sink_tokens:
            section = bytes(read_section(header, group, SectionKind.SINKS, payload))
            shape = (2, layers.count, header.sink_tokens, geometry.num_kv_heads, geometry.head_size)
            sinks = unpack_sinks(section, shape, geometry.torch_dtype, header.sink_bits).transpose(1, 2)
            keys, values = torch.cat((sinks[0], keys)), torch.cat((sinks[1], values))
        return _ReferenceGroup(group, keys, values)

    def decode_layer(self, parts: Sequence[_ReferenceGroup], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Join one layer of consecutive tier blocks; see `KvCodec.decode_layer`."""
        index = layer - self.layer_groups[parts[0].group].first
        keys = torch.cat([part.keys[:, index] for part in parts])
        return keys, torch.cat([part.values[:, index] for part in parts])

    def _largest_sections(
        self, plan_id: int, num_tokens: int, sink_tokens: int, sink_bits: int
    ) -> dict[tuple[int, SectionKind], tuple[int, list[int]]]:
        """Return each section's least payload and its chunks at their largest, in stream order."""
        geometry, sections = self.geometry, {}
        coded = num_tokens - sink_tokens
        element_bits = 8 * geometry.torch_dtype.itemsize if sink_bits == 16 else 8
        for index, group in enumerate(self.parameters.groups):
            for kind, side in ((SectionKind.KEYS, group.keys), (SectionKind.VALUES, group.values)):
                least, most = self._payload_bounds(side.plans[plan_id], coded)
                sections[index, kind] = least, self._cut(side.plans[plan_id], coded, most)
            heads = 2 * group.layers.count * sink_tokens * geometry.num_kv_heads
            if heads:
                scale_bytes = 4 * heads if sink_bits == 8 else 0
                size = scale_bytes + heads * geometry.head_size * element_bits // 8
                sections[index, SectionKind.SINKS] = size, _even_cut(size)
        return sections

    def _payload_bounds(self, plan: Any, coded: int) -> tuple[int, int]:
        """Return the least and the most bytes of a payload of some coded tokens."""
        size = sum(4 * coded + part.size * math.ceil(coded * part.type.bits / 8) for part in plan.groups)
        return size, size

    def _cut(self, plan: Any, coded: int, size: int) -> list[int]:
        """Return the sizes of the chunks of a payload; their number does not depend on its size."""
        return _even_cut(size)

    def _encode_side(self, rows: Array, side: Any, plan_id: int) -> bytes:
        """Return the payload of rows ``[tokens, row]``."""
        return pack_coefficients(project(rows, side), side.plans[plan_id])

    def _decode_side(self, payload: bytes, side: Any, plan_id: int, coded: int) -> Array:
        """Return the rows ``[tokens, row]`` of a payload."""
        return reconstruct(unpack_coefficients(payload, side.plans[plan_id], coded), side)

    def _encode_block(self, block: TierBlock) -> bytes:
        block.check(self.geometry)
        sinks, tokens = block.sink_tokens, block.num_tokens
        positions = range(block.first_position + sinks, block.first_position + tokens)
        keys = rotate(block.keys[sinks:].double().numpy(), positions, self.parameters.rope, undo=True)
        values = block.values[sinks:].double().numpy()
        sections = []
        for group in self.parameters.groups:
            layers = slice(group.layers.first, group.layers.stop)
            for kind, kv, side in (
                (SectionKind.KEYS, keys, group.keys),
                (SectionKind.VALUES, values, group.values),
            ):
                rows = kv[:, layers].reshape(tokens - sinks, side.mean.numel())
                if not np.isfinite(rows).all():
                    raise EncodeRangeError("the KV holds NaN or infinity; keep this block raw")
                payload = self._encode_side(rows, side, self._plan_id)
                sizes = self._cut(side.plans[self._plan_id], tokens - sinks, len(payload))
                sections.append(Section(group.layers, kind, _deflate(payload, sizes)))
            if sinks:
                payload = pack_sinks(
                    block.keys[:sinks, layers], block.values[:sinks, layers], self._sink_bits
                )
                sections.append(
                    Section(group.layers, SectionKind.SINKS, _deflate(payload, _even_cut(len(payload))))
                )
        header = StreamHeader(
            profile=self.profile,
            plan_id=self._plan_id,
            artifact_id=self.parameters.artifact_id,
            geometry=self.geometry,
            first_position=block.first_position,
            num_tokens=tokens,
            sink_tokens=sinks,
            sink_bits=self._sink_bits,
            binding=block.binding,
        )
        return write_stream(header, sections)


def _even_cut(size: int) -> list[int]:
    return [min(_CHUNK_BYTES, size - start) for start in range(0, size, _CHUNK_BYTES)]


def _deflate(payload: bytes, sizes: Sequence[int]) -> list[EncodedChunk]:
    """Cut a payload into chunks and compress each, or store what does not shrink."""
    chunks, start = [], 0
    for size in sizes:
        plain = payload[start : start + size]
        start += size
        compressor = zlib.compressobj(wbits=-15)
        data = compressor.compress(plain) + compressor.flush()
        shrinks = len(data) < len(plain)
        chunks.append(EncodedChunk(DEFLATE if shrinks else STORE, len(plain), data if shrinks else plain))
    return chunks
