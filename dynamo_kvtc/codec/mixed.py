"""Streams of an artifact and raw ones side by side: each is decoded by the codec of its own profile.

Both have the same artifact id, keys and layer groups, so that a reader finds either under a key and need not
know which before it sees the header.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from dynamo_kvtc.codec.base import Buffer, KvCodec, TierBlock
from dynamo_kvtc.codec.bitstream import Profile, StreamHeader, peek_profile
from dynamo_kvtc.codec.raw import RawCodec
from dynamo_kvtc.errors import LayoutError

__all__ = ["MixedCodec"]


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """What one of the two codecs opened."""

    codec: KvCodec
    opened: Any


class MixedCodec(KvCodec):
    """Encodes with an artifact's codec, decodes its streams and raw ones.

    Parameters
    ----------
    coded : KvCodec
        The artifact's codec.
    raw : RawCodec
        With the same geometry, artifact id and layer groups.

    Raises
    ------
    LayoutError
        If the two differ in geometry or layer groups.
    """

    def __init__(self, coded: KvCodec, raw: RawCodec) -> None:
        if (coded.geometry, coded.layer_groups) != (raw.geometry, raw.layer_groups):
            raise LayoutError("raw streams beside an artifact's have its geometry and its layer groups")
        self.coded, self.raw = coded, raw
        self.geometry, self.layer_groups = coded.geometry, coded.layer_groups

    def header_bytes(self, num_tokens: int, sink_tokens: int) -> int:
        """Return the exact size of the header of a stream of the artifact's codec."""
        return self.coded.header_bytes(num_tokens, sink_tokens)

    def max_header_bytes(self, num_tokens: int, sink_tokens: int) -> int:
        """Return an upper bound of the header of any stream that either codec can decode."""
        return max(codec.max_header_bytes(num_tokens, sink_tokens) for codec in (self.coded, self.raw))

    def max_stream_bytes(self, num_tokens: int, sink_tokens: int) -> int:
        """Return an upper bound of a stream of the artifact's codec."""
        return self.coded.max_stream_bytes(num_tokens, sink_tokens)

    def warm_up(self) -> None:
        """Warm up the artifact's codec."""
        self.coded.warm_up()

    def encode(self, blocks: Sequence[TierBlock]) -> list[bytes]:
        """Encode with the artifact's codec."""
        return self.coded.encode(blocks)

    def read_header(self, data: Buffer, *, binding: bytes | None = None) -> StreamHeader:
        """Parse and verify the header of a stream of either codec; see `KvCodec.read_header`."""
        codec = self.raw if peek_profile(data) == Profile.RAW else self.coded
        return codec.read_header(data, binding=binding)

    def open_group(self, header: StreamHeader, group: int, payload: Buffer) -> _Part:
        """Open one layer group with the codec that the stream is of; see `KvCodec.open_group`."""
        codec = self._of(header)
        return _Part(codec, codec.open_group(header, group, payload))

    def join(self, parts: Sequence[_Part]) -> list[_Part]:
        """Join neighbours of one codec; see `KvCodec.join`."""
        return [
            _Part(codec, opened)
            for codec, run in groupby(parts, key=lambda part: part.codec)
            for opened in codec.join([part.opened for part in run])
        ]

    def decode_layer(self, parts: Sequence[_Part], layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn opened groups of either codec into one layer's KV; see `KvCodec.decode_layer`."""
        decoded: list[tuple[torch.Tensor, torch.Tensor]] = [
            codec.decode_layer([part.opened for part in run], layer)
            for codec, run in groupby(parts, key=lambda part: part.codec)
        ]
        if len(decoded) == 1:
            return decoded[0]
        keys, values = zip(*decoded, strict=True)
        return torch.cat(keys), torch.cat(values)

    def _of(self, header: StreamHeader) -> KvCodec:
        return self.raw if header.profile is Profile.RAW else self.coded
