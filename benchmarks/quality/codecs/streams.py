"""Codecs of the package, with the very streams that tiers store: one for each tier block of a document."""

from __future__ import annotations

import torch

from benchmarks.quality import SINK_TOKENS
from benchmarks.quality.codecs.base import DocumentCodec, StoredKv
from dynamo_kvtc.codec.base import KvCodec, TierBlock
from dynamo_kvtc.errors import EncodeRangeError

__all__ = ["StreamCodec"]


class StreamCodec(DocumentCodec):
    """Any `KvCodec`; stored are whole streams with their headers, and blocks that it refuses as they are.

    A codec refuses KV too unlike what it was calibrated for; such a block counts with its 16-bit bytes.

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
        decoded, sizes = zip(*(self._store_block(block) for block in blocks), strict=True)
        return StoredKv(
            keys=torch.cat([block.keys for block in decoded]),
            values=torch.cat([block.values for block in decoded]),
            stored_bytes=sum(sizes),
        )

    def _store_block(self, block: TierBlock) -> tuple[TierBlock, int]:
        """Return what a block decodes to, and the bytes that it takes."""
        try:
            (stream,) = self._codec.encode([block])
        except EncodeRangeError:
            return block, block.num_tokens * self._codec.geometry.token_bytes_16bit
        return self._codec.decode(stream), len(stream)
