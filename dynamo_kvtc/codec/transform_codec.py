"""What the transform-coding profiles (kvtc and rd) share: tier blocks to streams and back, fast on a CPU.

Encoding a tier block: RoPE off the keys, then for keys and values of every layer group centre, project,
quantise, pack, and entropy-code in chunks. The first tokens of a sequence (sinks) are kept apart. How the
rows of one side become a payload is each profile's own (`dynamo_kvtc.codec.side`).
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from dynamo_kvtc.codec.base import Buffer, KvCodec, TierBlock
from dynamo_kvtc.codec.bitstream import (
    EncodedChunk,
    Mapper,
    Profile,
    Section,
    SectionKind,
    StreamHeader,
    check_belongs,
    encode_chunks,
    header_size,
    parse_header,
    read_sections,
    write_stream,
)
from dynamo_kvtc.codec.entropy import EntropyCoder
from dynamo_kvtc.codec.geometry import LayerRange
from dynamo_kvtc.codec.header import SINK_BITS, align
from dynamo_kvtc.codec.opened_group import OpenedGroup, join_groups
from dynamo_kvtc.codec.paged_codec import PagedBlock
from dynamo_kvtc.codec.parameters import AnyParameters
from dynamo_kvtc.codec.side import Chunks, SideCodec
from dynamo_kvtc.codec.sinks import SinkCodec
from dynamo_kvtc.codec.transform import resolve_compute_dtype
from dynamo_kvtc.errors import ArtifactMismatchError, ChunkTableError, RopeError, UnsupportedVersionError

__all__ = ["TransformCodec"]


@dataclass(frozen=True, slots=True)
class _PendingSection:
    """A section whose chunks may still be in the hands of the entropy coder's threads."""

    layers: LayerRange
    kind: SectionKind
    chunks: Iterator[EncodedChunk]


class TransformCodec(KvCodec):
    """Codec of a transform-coding profile. It owns threads: after a fork, make another one in the child.

    Parameters
    ----------
    parameters : AnyParameters
        Transforms and plans of the subclass's profile, from an artifact.
    plan_id : int, optional
        Plan to encode with. None makes a codec for decoding only; decoding takes the plan that each
        stream names.
    sink_bits : int
        Bits of an element of a sink token, 8 or 16; for encoding.
    compute_dtype : str
        dtype of the products, one of `dynamo_kvtc.codec.transform.COMPUTE_DTYPES`.
    threads : int
        Threads for entropy coding; 1 codes in the caller's thread. Products use torch's own threads.
    coder : EntropyCoder
        Entropy coder to encode with.

    Attributes
    ----------
    profile : Profile
        The profile of its streams and parameters.
    sink_bits, coder : int, EntropyCoder
        As given.

    Raises
    ------
    ArtifactMismatchError
        If the parameters belong to another profile.
    RopeError
        If more channels are rotated than a head has.
    ValueError
        If another argument is out of range.
    """

    profile: ClassVar[Profile]

    def __init__(
        self,
        parameters: AnyParameters,
        *,
        plan_id: int | None,
        sink_bits: int,
        compute_dtype: str,
        threads: int,
        coder: EntropyCoder,
    ) -> None:
        if parameters.profile is not self.profile:
            raise ArtifactMismatchError(
                f"the artifact is of profile {parameters.profile.name}, the codec of {self.profile.name}; "
                "open it with dynamo_kvtc.codec.open.open_codec"
            )
        if sink_bits not in SINK_BITS:
            raise ValueError(f"sink_bits is {sink_bits}; choose one of {SINK_BITS}")
        if threads < 1:
            raise ValueError(f"threads is {threads}; at least 1 is needed")
        self.parameters = parameters
        self.geometry = parameters.geometry
        if parameters.rope.rotary_dim > self.geometry.head_size:
            raise RopeError(
                f"{parameters.rope.rotary_dim} channels are rotated, heads have {self.geometry.head_size}"
            )
        self.layer_groups = tuple(group.layers for group in parameters.groups)
        self._plan_id = plan_id
        self.sink_bits = sink_bits
        self._dtype = resolve_compute_dtype(compute_dtype)
        self.coder = coder
        self._sides: dict[tuple[int, SectionKind, int], SideCodec] = {}
        self._sides_lock = threading.Lock()
        self._map: Mapper = ThreadPoolExecutor(threads, "entropy").map if threads > 1 else map

    @property
    def plan_id(self) -> int | None:
        """The plan that is encoded with; None in a codec for decoding only."""
        return self._plan_id

    @property
    def mapper(self) -> Mapper:
        """What runs entropy coding, as `map` does, in the codec's threads."""
        return self._map

    # --- sizes -----------------------------------------------------------------------------------

    def header_bytes(self, num_tokens: int, sink_tokens: int) -> int:
        """Return the exact size of a stream's header with its chunk table."""
        return self._header_bytes(num_tokens, sink_tokens, self.encoding_plan, self.sink_bits)

    @lru_cache  # noqa: B019  # a codec lives as long as its process serves
    def max_header_bytes(self, num_tokens: int, sink_tokens: int) -> int:
        """Return an upper bound of the header of a stream of any plan and any sink bits."""
        return max(
            self._header_bytes(num_tokens, sink_tokens, plan_id, sink_bits)
            for plan_id in self.parameters.ratios
            for sink_bits in SINK_BITS
        )

    def _header_bytes(self, num_tokens: int, sink_tokens: int, plan_id: int, sink_bits: int) -> int:
        sections = self._max_chunks(num_tokens, sink_tokens, plan_id, sink_bits)
        return header_size(sum(len(chunks) or 1 for chunks in sections))

    def max_stream_bytes(self, num_tokens: int, sink_tokens: int) -> int:
        """Return an upper bound of a stream's size: that of chunks which do not shrink."""
        sections = self._max_chunks(num_tokens, sink_tokens, self.encoding_plan, self.sink_bits)
        sizes = (align(sum(chunk)) for chunks in sections for chunk in chunks)
        return self.header_bytes(num_tokens, sink_tokens) + sum(sizes)

    def _max_chunks(
        self, num_tokens: int, sink_tokens: int, plan_id: int, sink_bits: int
    ) -> Iterator[Chunks]:
        """Chunks of each section at their largest, in stream order."""
        sinks = SinkCodec(self.geometry, sink_bits)
        for group, layers in enumerate(self.layer_groups):
            for kind in (SectionKind.KEYS, SectionKind.VALUES):
                yield self._side(group, kind, plan_id).max_chunks(num_tokens - sink_tokens)
            if sink_tokens:
                yield [(size,) for size in sinks.chunk_sizes(layers.count, sink_tokens)]

    def warm_up(self) -> None:
        """Make the weights of the plan that is encoded with; see `KvCodec.warm_up`."""
        for group in range(len(self.layer_groups)):
            for kind in (SectionKind.KEYS, SectionKind.VALUES):
                self._side(group, kind, self.encoding_plan).warm_up()

    # --- encode ----------------------------------------------------------------------------------

    def encode(self, blocks: Sequence[TierBlock]) -> list[bytes]:
        """Encode tier blocks, one stream each; see `KvCodec.encode`."""
        plan_id = self.encoding_plan
        for block in blocks:
            block.check(self.geometry)
        # The pool codes the chunks of one block while the next one is transformed here.
        started = [(self.header(block), self._start(block, plan_id)) for block in blocks]
        return [
            write_stream(header, [Section(s.layers, s.kind, list(s.chunks)) for s in sections])
            for header, sections in started
        ]

    def header(self, block: TierBlock | PagedBlock) -> StreamHeader:
        """Return the header of the stream that a block is encoded to, without its chunk table.

        Raises
        ------
        ArtifactMismatchError
            If the codec was made for decoding only.
        """
        return StreamHeader(
            profile=self.profile,
            plan_id=self.encoding_plan,
            artifact_id=self.parameters.artifact_id,
            geometry=self.geometry,
            first_position=block.first_position,
            num_tokens=block.num_tokens,
            sink_tokens=block.sink_tokens,
            sink_bits=self.sink_bits,
            binding=block.binding,
        )

    def _start(self, block: TierBlock, plan_id: int) -> list[_PendingSection]:
        """Make all payloads of a block and hand their chunks to the entropy coder."""
        sinks, block_keys, block_values = block.sink_tokens, block.keys.cpu(), block.values.cpu()
        sink_codec = SinkCodec(self.geometry, self.sink_bits)
        coded = slice(sinks, block.num_tokens)
        positions = torch.arange(block.first_position + sinks, block.first_position + block.num_tokens)
        rope = self.parameters.rope
        unrotate = rope.inverse(*rope.cos_sin(positions))
        sections = []
        for group, layers in enumerate(self.layer_groups):
            span = slice(layers.first, layers.stop)
            keys = rope.rotate(block_keys[coded, span], *unrotate)
            values = block_values[coded, span].float()
            for kind, kv in ((SectionKind.KEYS, keys), (SectionKind.VALUES, values)):
                side = self._side(group, kind, plan_id)
                sections.append(self._section(layers, kind, *side.encode(kv.flatten(1))))
            if sinks:
                payload = sink_codec.encode(block_keys[:sinks, span], block_values[:sinks, span])
                chunks = [(size,) for size in sink_codec.chunk_sizes(layers.count, sinks)]
                sections.append(self._section(layers, SectionKind.SINKS, payload, chunks))
        return sections

    def _section(
        self, layers: LayerRange, kind: SectionKind, payload: NDArray[np.uint8], chunks: Chunks
    ) -> _PendingSection:
        sizes = [sum(runs) for runs in chunks]
        view, stops = payload.data, accumulate(sizes)
        pieces = [view[stop - size : stop] for size, stop in zip(sizes, stops, strict=True)]
        together, pairs = self.coder.batch, list(zip(pieces, chunks, strict=True))
        batches = [pairs[start : start + together] for start in range(0, len(pairs), together)]
        return _PendingSection(layers, kind, chain.from_iterable(self._map(self._encode_chunks, batches)))

    def _encode_chunks(self, pairs: Sequence[tuple[memoryview, Sequence[int]]]) -> list[EncodedChunk]:
        return encode_chunks(pairs, self.coder)

    # --- decode ----------------------------------------------------------------------------------

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
            raise UnsupportedVersionError(
                f"the stream follows bit plan {header.plan_id}, which the artifact does not have"
            )
        coded = header.num_tokens - header.sink_tokens
        sinks = SinkCodec(self.geometry, header.sink_bits)
        for group, layers in enumerate(self.layer_groups):
            size = sinks.payload_size(layers.count, header.sink_tokens)
            bounds = {
                SectionKind.KEYS: self._side(group, SectionKind.KEYS, header.plan_id).payload_bounds(coded),
                SectionKind.VALUES: self._side(group, SectionKind.VALUES, header.plan_id).payload_bounds(
                    coded
                ),
                SectionKind.SINKS: (size, size),
            }
            for kind, (least, most) in bounds.items():
                found = header.section_size(group, kind)
                if not least <= found <= most:
                    raise ChunkTableError(
                        f"the {kind.name} of layer group {group} have {found} payload bytes; "
                        f"their plan and tokens give {least} to {most}"
                    )
        return header

    def open_group(self, header: StreamHeader, group: int, payload: Buffer) -> OpenedGroup:
        """Verify, inflate and dequantise one layer group of one stream; see `KvCodec.open_group`."""
        coded = header.num_tokens - header.sink_tokens
        first = header.first_position + header.sink_tokens
        kinds = (SectionKind.KEYS, SectionKind.VALUES, SectionKind.SINKS)
        read = read_sections(header, group, kinds, payload, self._map)
        key_payload, value_payload, sink_payload = (np.frombuffer(one, dtype=np.uint8) for one in read)
        keys = self._side(group, SectionKind.KEYS, header.plan_id)
        values = self._side(group, SectionKind.VALUES, header.plan_id)
        sinks = SinkCodec(self.geometry, header.sink_bits)
        sink_keys, sink_values = sinks.decode(
            sink_payload, self.layer_groups[group].count, header.sink_tokens
        )
        return OpenedGroup(
            group=group,
            plan_id=header.plan_id,
            keys=keys.decode(key_payload, coded),
            values=values.decode(value_payload, coded),
            sink_keys=sink_keys,
            sink_values=sink_values,
            positions=torch.arange(first, first + coded),
            rope=self.parameters.rope,
        )

    def join(self, parts: Sequence[OpenedGroup]) -> list[OpenedGroup]:
        """Join streams of one plan; larger products are faster. See `KvCodec.join`."""
        return join_groups(parts)

    def decode_layer(self, parts: Sequence[OpenedGroup], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn opened groups of consecutive tier blocks into one layer's KV; see `KvCodec.decode_layer`."""
        geometry = self.geometry
        tokens = sum(part.num_tokens for part in parts)
        shape = (tokens, geometry.num_kv_heads, geometry.head_size)
        keys, values = torch.empty((2, *shape), dtype=geometry.torch_dtype)
        start = 0
        # One product per part keeps all steps on it within the caches of the CPU.
        for part in parts:
            stop = start + part.num_tokens
            self._decode_part(part, layer, keys[start:stop], values[start:stop])
            start = stop
        return keys, values

    def _decode_part(self, part: OpenedGroup, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write one layer of one part to `keys` and `values`, ``[tokens, num_kv_heads, head_size]``."""
        index = layer - self.layer_groups[part.group].first
        sinks = part.sink_tokens
        coded_keys, coded_values = keys[sinks:], values[sinks:]
        rows = self._side(part.group, SectionKind.KEYS, part.plan_id).reconstruct(part.keys, index)
        rotated = self.parameters.rope.rotate(rows.view(coded_keys.shape), *part.cos_sin)
        coded_keys.copy_(self._in_range(rotated))
        rows = self._side(part.group, SectionKind.VALUES, part.plan_id).reconstruct(part.values, index)
        coded_values.copy_(self._in_range(rows.view(coded_values.shape)))
        keys[:sinks], values[:sinks] = part.sink_keys[index], part.sink_values[index]

    def _in_range(self, kv: torch.Tensor) -> torch.Tensor:
        """Keep the quantisation error of the largest float16 numbers from turning them into infinity."""
        if self.geometry.torch_dtype is not torch.float16:
            return kv
        limit = torch.finfo(torch.float16).max
        return kv.clamp_(-limit, limit)

    # --- shared ----------------------------------------------------------------------------------

    @property
    def encoding_plan(self) -> int:
        """The plan to encode with.

        Raises
        ------
        ArtifactMismatchError
            If the codec was made for decoding only.
        """
        if self._plan_id is None:
            raise ArtifactMismatchError(
                "this codec was made for decoding only; give it a ratio to encode with"
            )
        return self._plan_id

    def _side(self, group: int, kind: SectionKind, plan_id: int) -> SideCodec:
        key = (group, kind, plan_id)
        with self._sides_lock:
            if key not in self._sides:
                self._sides[key] = self._make_side(group, kind, plan_id)
            return self._sides[key]

    @abstractmethod
    def _make_side(self, group: int, kind: SectionKind, plan_id: int) -> SideCodec:
        """Make the codec of the keys or values of a layer group under one plan."""
