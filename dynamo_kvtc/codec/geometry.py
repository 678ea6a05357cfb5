"""The shape of a KV cache as the codec sees it: one row per token, all layers and KV heads."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dynamo_kvtc.errors import LayoutError

__all__ = ["CACHE_DTYPES", "KvGeometry", "LayerRange"]

#: dtypes of a paged cache that can be encoded, by the name used in configs, artifacts and headers.
CACHE_DTYPES: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


@dataclass(frozen=True, slots=True)
class LayerRange:
    """Consecutive layers ``first .. first + count - 1``."""

    first: int
    count: int

    @property
    def stop(self) -> int:
        """One past the last layer."""
        return self.first + self.count

    def __contains__(self, layer: int) -> bool:
        return self.first <= layer < self.stop


@dataclass(frozen=True, slots=True)
class KvGeometry:
    """What one token's keys (or values) look like.

    Attributes
    ----------
    num_layers, num_kv_heads, head_size : int
        The model's attention shape; MHA, GQA and MQA alike.
    dtype : str
        Name of the cache's dtype, a key of `CACHE_DTYPES`.
    """

    num_layers: int
    num_kv_heads: int
    head_size: int
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if min(self.num_layers, self.num_kv_heads, self.head_size) < 1:
            raise LayoutError(f"layers, KV heads and head size must be positive: {self}")
        if self.dtype not in CACHE_DTYPES:
            known = ", ".join(CACHE_DTYPES)
            raise LayoutError(f"cannot encode a {self.dtype} cache; supported cache dtypes: {known}")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The cache's torch dtype."""
        return CACHE_DTYPES[self.dtype]

    @property
    def layer_size(self) -> int:
        """Elements of one token's keys (or values) in one layer: ``num_kv_heads * head_size``."""
        return self.num_kv_heads * self.head_size

    @property
    def row_size(self) -> int:
        """Elements of one token's keys (or values) in all layers; ``p`` in the KVTC paper."""
        return self.num_layers * self.layer_size

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in the cache's own dtype."""
        return 2 * self.row_size * self.torch_dtype.itemsize

    @property
    def token_bytes_16bit(self) -> int:
        """Bytes of one token's keys and values at 16 bits an element, the unit of every ratio."""
        return 4 * self.row_size
