"""Paged caches whose pages hold their elements in an order of the engine's own.

Some engines rearrange a page for their kernels (transposed keys, tiles, interleaved pairs). All that is
needed to read such a page is where each element lies, the same in every page.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dynamo_kvtc.errors import LayoutError
from dynamo_kvtc.pipeline.paged import PagedKvCache

__all__ = ["PermutedKvCache"]


class PermutedKvCache(PagedKvCache):
    """A paged cache with one contiguous page per block and layer, keys and values together.

    Parameters
    ----------
    pages : Sequence[torch.Tensor]
        ``[blocks, page_size]`` per layer; page_size counts elements.
    key_places, value_places : torch.Tensor
        ``[block_size, heads, head_size]``, int64: where in a page each element lies. Together they name every
        element of a page exactly once.

    Raises
    ------
    LayoutError
        If the places are not a permutation of a page.
    """

    def __init__(
        self, pages: Sequence[torch.Tensor], key_places: torch.Tensor, value_places: torch.Tensor
    ) -> None:
        if not pages or any(layer.ndim != 2 or layer.shape != pages[0].shape for layer in pages):
            raise LayoutError("a permuted cache needs [blocks, page_size] pages of one shape per layer")
        if key_places.ndim != 3 or key_places.shape != value_places.shape:
            raise LayoutError("places must be [block_size, heads, head_size], the same for keys and values")
        places = torch.cat([key_places.flatten(), value_places.flatten()])
        page_size = int(pages[0].shape[1])
        if not torch.equal(places.sort().values, torch.arange(page_size, device=places.device)):
            raise LayoutError(
                f"the {places.numel()} places of a token's keys and values do not name each of a page's "
                f"{page_size} elements once; this cache layout is not supported"
            )
        self._pages = tuple(pages)
        self._describe(pages, len(pages), (pages[0].shape[0], *key_places.shape))
        self._places = places.to(self._device)
        self._origins = torch.argsort(self._places)

    def _read(self, layer: int, index: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        plain = self._pages[layer].index_select(0, index).index_select(1, self._places)
        for out, half in zip((keys, values), plain.chunk(2, dim=1), strict=True):
            out.copy_(half.reshape(out.shape))

    def _write(self, layer: int, index: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        plain = torch.cat([keys.flatten(1), values.flatten(1)], dim=1).to(self._device)
        self._pages[layer].index_copy_(0, index, plain.index_select(1, self._origins))
