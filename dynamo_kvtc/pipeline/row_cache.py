"""Host memory of an engine, one chunk a row, as a `PagedKvCache`.

A row holds, for each layer in turn, the pages of the chunk's blocks one after the other; then padding.
Within a page the engine's own order holds, which the caller names.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dynamo_kvtc.codec.geometry import KvGeometry
from dynamo_kvtc.errors import LayoutError
from dynamo_kvtc.pipeline.permuted import PermutedKvCache

__all__ = ["Places", "RowCache", "chunk_places", "split_places"]

#: Where in a page each element of keys and of values lies, ``[tokens, heads, head_size]`` each, int64.
Places = tuple[torch.Tensor, torch.Tensor]


def split_places(block_size: int, heads: int, head_size: int) -> Places:
    """Return the places of a page ``[heads, block_size, 2 * head_size]``: a token's keys, then its values."""
    page = torch.arange(2 * block_size * heads * head_size).reshape(heads, block_size, 2 * head_size)
    keys, values = torch.split(page.transpose(0, 1), head_size, dim=-1)
    return keys.contiguous(), values.contiguous()


def chunk_places(places: Places, blocks_per_chunk: int) -> Places:
    """Return the places of a chunk, whose pages follow one another, from those of a page."""
    page_size = sum(side.numel() for side in places)
    keys, values = (
        torch.cat([side + block * page_size for block in range(blocks_per_chunk)]) for side in places
    )
    return keys, values


class RowCache(PermutedKvCache):
    """A paged cache over host memory that another part owns.

    Parameters
    ----------
    rows : memoryview
        Two dimensions: rows, bytes of a row.
    geometry : KvGeometry
        What a token's KV is like, with its layers in the model's order.
    places : Places
        Those of a chunk.
    layer_order : Sequence[int]
        Which layer of the model each run of pages belongs to.

    Raises
    ------
    LayoutError
        If a row cannot hold a chunk of this kind.
    """

    def __init__(
        self, rows: memoryview, geometry: KvGeometry, places: Places, layer_order: Sequence[int]
    ) -> None:
        itemsize = geometry.torch_dtype.itemsize
        layer_bytes = sum(side.numel() for side in places) * itemsize
        if rows.ndim != 2 or rows.readonly or not rows.c_contiguous:
            raise LayoutError("the engine's host memory is not a writable array of contiguous rows")
        if sorted(layer_order) != list(range(geometry.num_layers)):
            raise LayoutError(f"the layers of a row, {list(layer_order)}, are not the model's layers")
        # Through numpy: a two-dimensional memoryview cannot be sliced.
        raw = np.asarray(rows).view(np.uint8)
        row_bytes = int(raw.shape[1])
        if row_bytes < layer_bytes * geometry.num_layers or row_bytes % itemsize:
            raise LayoutError(
                f"a row of {row_bytes} bytes cannot hold {geometry.num_layers} layers of {layer_bytes} bytes"
            )
        elements = torch.from_numpy(raw).view(geometry.torch_dtype)
        size = layer_bytes // itemsize
        runs = {layer: elements[:, run * size : (run + 1) * size] for run, layer in enumerate(layer_order)}
        super().__init__([runs[layer] for layer in range(geometry.num_layers)], *places)
        if self.geometry != geometry:
            raise LayoutError(f"rows of {self.geometry} are not those of {geometry}")

    def release(self) -> None:
        """Let go of the memory, so that its owner may unmap it. Nothing may use this cache afterwards."""
        self._pages = ()
