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
        sides = [_strided(pages, places) for places in (key_places, value_places)]
        self._views = None if sides[0] is None or sides[1] is None else (sides[0], sides[1])

    @property
    def has_views(self) -> bool:
        """Whether the order within a page is one that strides express."""
        return self._views is not None

    @property
    def views(self) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
        """One view per layer; see `PagedKvCache.views`."""
        if self._views is None:
            raise LayoutError(
                "this cache's pages hold their elements in an order that strides do not express"
            )
        return self._views

    def _read(self, layer: int, index: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        plain = self._pages[layer].index_select(0, index).index_select(1, self._places)
        for out, half in zip((keys, values), plain.chunk(2, dim=1), strict=True):
            out.copy_(half.reshape(out.shape))

    def _write(self, layer: int, index: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        plain = torch.cat([keys.flatten(1), values.flatten(1)], dim=1).to(self._device)
        self._pages[layer].index_copy_(0, index, plain.index_select(1, self._origins))


def _strided(pages: Sequence[torch.Tensor], places: torch.Tensor) -> list[torch.Tensor] | None:
    """Return views ``[blocks, block_size, heads, head_size]`` of pages if `places` are equally spaced."""
    first, steps = int(places[0, 0, 0]), []
    expected = torch.full_like(places, first)
    for axis, size in enumerate(places.shape):
        step = int(places.select(axis, min(1, size - 1))[0, 0]) - first
        shape = [-1 if own == axis else 1 for own in range(3)]
        expected += torch.arange(size, device=places.device).view(shape) * step
        steps.append(step)
    if min(steps) < 0 or not torch.equal(expected, places):
        return None
    return [
        page.as_strided(
            (page.shape[0], *places.shape),
            (page.stride(0), *(step * page.stride(1) for step in steps)),
            page.storage_offset() + first * page.stride(1),
        )
        for page in pages
    ]
