"""No compression: the yardstick of quality, and what 16 bits alone cost.

``exact`` returns the cache as the model computed it, in float32, and counts 16 bits an element: the
reference of every comparison, with a divergence of 0 by definition. ``bfloat16`` rounds as a 16-bit cache
does; differences below its divergence cannot matter to anyone who serves in bfloat16.
"""

from __future__ import annotations

import torch

from benchmarks.quality.codecs.base import (
    CodecFamily,
    CodecInputs,
    DocumentCodec,
    StoredKv,
    round_to_bfloat16,
)

__all__ = ["FAMILY", "NoCodec"]


class NoCodec(DocumentCodec):
    """Stores 16 bits an element.

    Parameters
    ----------
    rounded : bool
        Whether what is returned is rounded to bfloat16.
    """

    def __init__(self, rounded: bool) -> None:
        self.family = "none"
        self.setting = "bfloat16" if rounded else "exact"
        self._rounded = rounded

    def store(self, keys: torch.Tensor, values: torch.Tensor) -> StoredKv:
        """Return the KV as it is, or rounded; see `DocumentCodec.store`."""
        stored_bytes = 2 * (keys.numel() + values.numel())
        if self._rounded:
            return StoredKv(round_to_bfloat16(keys), round_to_bfloat16(values), stored_bytes)
        return StoredKv(keys, values, stored_bytes)


def _build(inputs: CodecInputs) -> list[DocumentCodec]:
    return [NoCodec(rounded=False), NoCodec(rounded=True)]


FAMILY = CodecFamily("none", _build)
