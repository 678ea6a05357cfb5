"""The raw profile: a tier block's bytes as they are, in the container of every other profile.

For blocks whose encoding would not pay, for caches without an artifact, and as the yardstick of the
other profiles. Decoding returns the very bits that were encoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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

__all__ = ["LayerKv", "RawCodec", "RawGroup"]

#: Keys and values of one layer, ``[tokens, num_kv_heads, head_size]`` each.
LayerKv = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class RawGroup:
    """One layer group of one stream.

    Attributes
    ----------
    first_layer : int
        Layer that `kv` begins with.
    kv : torch.Tensor
        ``[layers, 2, tokens, num_kv_heads, head_size]``, keys before values, in the cache's dtype.
    """

    first_layer: int
    kv: torch.Tensor


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
    layer_groups : Sequence[LayerRange], optional
        The layer groups of the streams; by default each layer is one. Beside an artifact's streams they must
        be the artifact's, so that one onboard can read both.
    """

    def __init__(
        self,
        geometry: KvGeometry,
        artifact_id: bytes = bytes(ID_BYTES),
        coder: EntropyCoder | None = None,
        layer_groups: Sequence[LayerRange] | None = None,
    ) -> None:
        self.geometry = geometry
        single = tuple(LayerRange(layer, 1) for layer in range(geometry.num_layers))
        self.layer_groups = single if layer_groups is None else tuple(layer_groups)
        self._artifact_id = artifact_id
        self._coder = coder or StoreCoder()

    def header_bytes(self, num_tokens: int, sink_tokens: int) -> int:
        """Return the exact size of a stream's header with its chunk table."""
        size, most = self._layer_bytes(num_tokens), self._coder.max_plain_size
        return header_size(sum(-(-size * layers.count // most) for layers in self.layer_groups))

    def max_stream_bytes(self, num_tokens: int, sink_tokens: int) -> int:
        """Return an upper bound of a stream's size; with the store coder, the exact size."""
        total = self.header_bytes(num_tokens, sink_tokens)
        for layers in self.layer_groups:
            full, rest = divmod(self._layer_bytes(num_tokens) * layers.count, self._coder.max_plain_size)
            total += full * align(self._coder.max_plain_size) + align(rest)
        return total

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
        for group, layers in enumerate(self.layer_groups):
            expected = layers.count * self._layer_bytes(header.num_tokens)
            size = header.section_size(group, SectionKind.RAW)
            if size != expected:
                raise ChunkTableError(
                    f"layer group {group} has {size} bytes where {header.num_tokens} tokens take {expected}"
                )
        return header

    def open_group(self, header: StreamHeader, group: int, payload: Buffer) -> RawGroup:
        """Verify one layer group's bytes and return them as a tensor."""
        data = read_section(header, group, SectionKind.RAW, payload)
        layers, geometry = self.layer_groups[group], self.geometry
        shape = (layers.count, 2, header.num_tokens, geometry.num_kv_heads, geometry.head_size)
        return RawGroup(layers.first, torch.frombuffer(data, dtype=geometry.torch_dtype).view(shape))

    def decode_layer(self, parts: Sequence[RawGroup], layer: int) -> LayerKv:
        """Join one layer of consecutive tier blocks."""
        keys, values = zip(*(part.kv[layer - part.first_layer] for part in parts), strict=True)
        return torch.cat(keys), torch.cat(values)

    def _layer_bytes(self, num_tokens: int) -> int:
        return 2 * num_tokens * self.geometry.layer_size * self.geometry.torch_dtype.itemsize

    def _encode_block(self, block: TierBlock) -> bytes:
        block.check(self.geometry)
        # [layer, keys and values, token, head, channel]: one layer group's bytes are contiguous.
        by_layer = torch.stack((block.keys.transpose(0, 1), block.values.transpose(0, 1)), dim=1).cpu()
        size = self._coder.max_plain_size
        sections = []
        for layers in self.layer_groups:
            kv = by_layer[layers.first : layers.stop]
            data = kv.flatten().view(torch.uint8).numpy().data
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
