"""Codecs of the package, with the very streams that tiers store: one for each tier block of a document."""

from __future__ import annotations

import torch

from benchmarks.quality import SINK_TOKENS
from benchmarks.quality.codecs.base import DocumentCodec, StoredKv
from dynamo_kvtc.codec.base import KvCodec, TierBlock

__all__ = ["StreamCodec"]


class StreamCodec(DocumentCodec):
    """Any `KvCodec`; stored are whole streams with their headers.

    Parameters
    ----------
    family : str
        Name in the registry.
    setting : str
        What distinguishes it within its family.
    codec : KvCodec
        The codec itself, for the shape and dtype of the caches.
    tier_block_tokens : int
        Tokens of one stream; the last one of a document is shorter where this does not divide its tokens.
    """

    def __init__(self, family: str, setting: str, codec: KvCodec, tier_block_tokens: int) -> None:
        self.family = family
        self.setting = setting
        self._codec = codec
        self._tier_block_tokens = tier_block_tokens

    def store(self, keys: torch.Tensor, values: torch.Tensor) -> StoredKv:
        """Encode a document's KV and decode it again; see `DocumentCodec.store`."""
        step = self._tier_block_tokens
        blocks = [
            TierBlock(
                keys=keys[first : first + step],
                values=values[first : first + step],
                first_position=first,
                sink_tokens=min(SINK_TOKENS, keys.shape[0]) if first == 0 else 0,
            )
            for first in range(0, keys.shape[0], step)
        ]
        streams = self._codec.encode(blocks)
        decoded = [self._codec.decode(stream) for stream in streams]
        return StoredKv(
            keys=torch.cat([block.keys for block in decoded]),
            values=torch.cat([block.values for block in decoded]),
            stored_bytes=sum(len(stream) for stream in streams),
        )
