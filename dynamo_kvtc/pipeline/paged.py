"""A view of an engine's paged KV cache (tier G1): gather tier blocks, scatter layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dynamo_kvtc.codec.geometry import CACHE_DTYPES, KvGeometry
from dynamo_kvtc.errors import LayoutError

__all__ = ["LAYOUTS", "PagedKvCache"]

#: How one layer's tensor orders its axes: 2 = keys then values, B = blocks, N = tokens of a block,
#: H = KV heads, D = channels of a head.
LAYOUTS: tuple[str, ...] = ("2BNHD", "2BHND", "B2NHD", "B2HND")


class PagedKvCache:
    """Per-layer views ``[blocks, block_size, heads, head_size]`` of an engine's own tensors.

    Copies nothing and owns nothing: the engine guarantees that blocks handed to `gather` are not
    written, and blocks handed to `scatter_layer` are not read, until the call is over.

    Parameters
    ----------
    keys, values : Sequence[torch.Tensor]
        One view per layer, all of the same shape and dtype.

    Raises
    ------
    LayoutError
        If the views differ in shape or dtype, or their dtype cannot be encoded.
    """

    def __init__(self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
        tensors = [*keys, *values]
        if not keys or len(keys) != len(values):
            raise LayoutError("a paged cache needs one key view and one value view per layer")
        shape, dtype = tensors[0].shape, tensors[0].dtype
        if len(shape) != 4 or any(t.shape != shape or t.dtype != dtype for t in tensors):
            raise LayoutError(
                "all layers must be [blocks, block_size, heads, head_size] views of one shape and dtype; "
                "hybrid and MLA caches are not supported"
            )
        names = [name for name, known in CACHE_DTYPES.items() if known == dtype]
        if not names:
            raise LayoutError(f"cannot encode a cache of {dtype}; supported: {', '.join(CACHE_DTYPES)}")
        self.keys = tuple(keys)
        self.values = tuple(values)
        self.num_blocks, self.block_size = int(shape[0]), int(shape[1])
        self.geometry = KvGeometry(len(keys), int(shape[2]), int(shape[3]), names[0])

    @classmethod
    def from_layers(cls, layers: Sequence[torch.Tensor], layout: str) -> PagedKvCache:
        """Build the views from per-layer tensors that hold keys and values together.

        Parameters
        ----------
        layers : Sequence[torch.Tensor]
            One 5-dimensional tensor per layer.
        layout : str
            One of `LAYOUTS`.
        """
        if layout not in LAYOUTS:
            raise LayoutError(f"unknown cache layout {layout!r}; supported: {', '.join(LAYOUTS)}")
        if any(layer.ndim != 5 or layer.shape[layout.index("2")] != 2 for layer in layers):
            raise LayoutError(f"layers do not have the axes of layout {layout}")
        order = [layout.index(axis) for axis in "2BNHD"]
        views = [layer.permute(order) for layer in layers]
        return cls([view[0] for view in views], [view[1] for view in views])

    def check_blocks(self, block_ids: Sequence[int]) -> None:
        """Raise `LayoutError` if a block id lies outside the cache."""
        if block_ids and not (min(block_ids) >= -1 and max(block_ids) < self.num_blocks):
            raise LayoutError(f"block ids must lie in 0..{self.num_blocks - 1} (or be -1 to skip a block)")

    def gather(self, block_ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Copy blocks out.

        Returns
        -------
        tuple[torch.Tensor, torch.Tensor]
            Keys and values ``[len(block_ids) * block_size, num_layers, num_kv_heads, head_size]``.
        """
        index = torch.as_tensor(block_ids, dtype=torch.int64, device=self.keys[0].device)
        geometry = self.geometry
        tokens = len(block_ids) * self.block_size
        shape = (tokens, geometry.num_layers, geometry.num_kv_heads, geometry.head_size)
        gathered = []
        for layers in (self.keys, self.values):
            out = layers[0].new_empty(shape)
            for layer, view in enumerate(layers):
                out[:, layer] = view[index].flatten(0, 1)
            gathered.append(out)
        return gathered[0], gathered[1]

    def scatter_layer(
        self, layer: int, block_ids: Sequence[int], keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Write one layer's KV into blocks.

        Parameters
        ----------
        block_ids : Sequence[int]
            Destination of each run of `block_size` tokens; -1 leaves a run out.
        keys, values : torch.Tensor
            ``[len(block_ids) * block_size, num_kv_heads, head_size]``.
        """
        shape = (len(block_ids), *self.keys[layer].shape[1:])
        wanted = [run for run, block in enumerate(block_ids) if block >= 0]
        index = torch.as_tensor([block_ids[run] for run in wanted], dtype=torch.int64, device=keys.device)
        for view, rows in ((self.keys[layer], keys), (self.values[layer], values)):
            blocks = rows.reshape(shape)
            view[index] = blocks if len(wanted) == len(block_ids) else blocks[wanted]
