"""The raw profile: a tier block's bytes as they are, in the container of every other profile.

For blocks whose encoding would not pay, for caches without an artifact, and as the yardstick of the
other profiles. Decoding returns the very bits that were encoded. Each layer is a layer group of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dynamo_kvtc.codec.base import Buffer, KvCodec, TierBlock
from dynamo_kvtc.codec.bitstream import (
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
from dynamo_kvtc.codec.entropy import EntropyCoder, StoreCoder
from dynamo_kvtc.codec.geometry import KvGeometry, LayerRange
from dynamo_kvtc.codec.header import ID_BYTES, align
from dynamo_kvtc.errors import ChunkTableError

__all__ = ["LayerKv", "RawCodec"]

#: Keys and values of one layer, ``[tokens, num_kv_heads, head_size]`` each.
LayerKv = tuple[torch.Tensor, torch.Tensor]


class RawCodec(KvCodec):
    """Stores a cache's bytes without loss.

    Sink tokens get no treatment of their own; their number is recorded.

    Parameters
    ----------
    geometry : KvGeometry
        Shape and dtype of the cache.
    artifact_id : bytes
        Written to every header and compared on reading; zeros where no artifact is in use.
    coder : EntropyCoder, optional
        Entropy coder of the chunks; by default they are stored as they are.
    """

    def __init__(
        self, geometry: KvGeometry, artifact_id: bytes = bytes(ID_BYTES), coder: EntropyCoder | None = None
    ) -> None:
        self.geometry = geometry
        self.layer_groups = tuple(LayerRange(layer, 1) for layer in range(geometry.num_layers))
        self._artifact_id = artifact_id
        self._coder = coder or StoreCoder()

    def header_bytes(self, num_tokens: int, sink_tokens: int) -> int:
        """Return the exact size of a stream's header with its chunk table."""
        num_chunks = -(-self._layer_bytes(num_tokens) // self._coder.max_plain_size)
        return header_size(self.geometry.num_layers * num_chunks)

    def max_stream_bytes(self, num_tokens: int, sink_tokens: int) -> int:
        """Return an upper bound of a stream's size; with the store coder, the exact size."""
        full, rest = divmod(self._layer_bytes(num_tokens), self._coder.max_plain_size)
        layer = full * align(self._coder.max_plain_size) + align(rest)
        return self.header_bytes(num_tokens, sink_tokens) + self.geometry.num_layers * layer

    def encode(self, blocks: Sequence[TierBlock]) -> list[bytes]:
        """Encode tier blocks, one stream each.

        Raises
        ------
        LayoutError
            If a block's shape or dtype is not the codec's.
        """
        return [self._encode_block(block) for block in blocks]

    def read_header(self, data: Buffer, *, binding: bytes | None = None) -> StreamHeader:
        """Parse and verify a header; see `KvCodec.read_header`."""
        header = parse_header(data)
        check_belongs(
            header,
            profile=Profile.RAW,
            artifact_id=self._artifact_id,
            geometry=self.geometry,
            layer_groups=self.layer_groups,
            binding=binding,
        )
        expected = self._layer_bytes(header.num_tokens)
        for group in range(len(self.layer_groups)):
            size = header.section_size(group, SectionKind.RAW)
            if size != expected:
                raise ChunkTableError(
                    f"layer {group} has {size} bytes where {header.num_tokens} tokens take {expected}"
                )
        return header

    def open_group(self, header: StreamHeader, group: int, payload: Buffer) -> LayerKv:
        """Verify one layer's bytes and return them as tensors."""
        data = read_section(header, group, SectionKind.RAW, payload)
        shape = (2, header.num_tokens, self.geometry.num_kv_heads, self.geometry.head_size)
        keys, values = torch.frombuffer(data, dtype=self.geometry.torch_dtype).view(shape)
        return keys, values

    def decode_layer(self, parts: Sequence[LayerKv], layer: int) -> LayerKv:
        """Join one layer of consecutive tier blocks."""
        keys, values = zip(*parts, strict=True)
        return torch.cat(keys), torch.cat(values)

    def _layer_bytes(self, num_tokens: int) -> int:
        return 2 * num_tokens * self.geometry.layer_size * self.geometry.torch_dtype.itemsize

    def _encode_block(self, block: TierBlock) -> bytes:
        block.check(self.geometry)
        # [layer, keys and values, token, head, channel]: one layer's bytes are contiguous.
        by_layer = torch.stack((block.keys.transpose(0, 1), block.values.transpose(0, 1)), dim=1).cpu()
        size = self._coder.max_plain_size
        sections = []
        for layers, kv in zip(self.layer_groups, by_layer, strict=True):
            data = memoryview(kv.flatten().view(torch.uint8).numpy())
            chunks = [
                encode_chunk(data[start : start + size], self._coder) for start in range(0, len(data), size)
            ]
            sections.append(Section(layers, SectionKind.RAW, chunks))
        header = StreamHeader(
            profile=Profile.RAW,
            plan_id=0,
            artifact_id=self._artifact_id,
            geometry=self.geometry,
            first_position=block.first_position,
            num_tokens=block.num_tokens,
            sink_tokens=block.sink_tokens,
            binding=block.binding,
        )
        return write_stream(header, sections)
