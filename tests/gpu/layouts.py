"""Paged caches in every layout that engines use, and combinations of cases that cover all pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any

import torch

from dynamo_kvtc.pipeline.paged import LAYOUTS, PagedKvCache

#: What can be made: axes of one tensor per layer (2 = keys then values, B blocks, N tokens, H heads,
#: D channels), vLLM's pages with a token's keys before its values, KVBM's tensor of all layers (L).
CACHES = (*LAYOUTS, "BNH2D", "BHN2D", "BL2NHD")


def make_cache(
    layout: str,
    layers: int,
    blocks: int,
    block_size: int,
    heads: int,
    head_size: int,
    dtype: torch.dtype,
    device: torch.device,
    fill: float = float("nan"),
) -> PagedKvCache:
    """Return a cache whose elements are `fill`."""
    sizes = {"2": 2, "B": blocks, "N": block_size, "H": heads, "D": head_size, "L": layers}

    def tensor(axes: str) -> torch.Tensor:
        return torch.full([sizes[axis] for axis in axes], fill, dtype=dtype, device=device)

    if "L" in layout:
        whole = tensor(layout).permute([layout.index(axis) for axis in "L2BNHD"])
        return PagedKvCache([layer[0] for layer in whole], [layer[1] for layer in whole])
    if layout in LAYOUTS:
        return PagedKvCache.from_layers([tensor(layout) for _ in range(layers)], layout)
    order = [layout.index(axis) for axis in "2BNHD"]
    views = [tensor(layout).permute(order) for _ in range(layers)]
    return PagedKvCache([view[0] for view in views], [view[1] for view in views])


def all_pairs(options: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Return few cases such that every pair of values of two options occurs in one; always the same."""
    names = list(options)
    missing = {
        (a, x, b, y)
        for a, b in combinations(names, 2)
        for x, y in product(range(len(options[a])), range(len(options[b])))
    }
    cases = []
    while missing:
        a, x, b, y = min(missing)
        case = {a: x, b: y}
        for name in names:
            if name in case:
                continue

            gains = [
                sum(
                    min((m, case[m], name, value), (name, value, m, case[m]), key=lambda p: names.index(p[0]))
                    in missing
                    for m in case
                )
                for value in range(len(options[name]))
            ]
            case[name] = gains.index(max(gains))
        missing -= {(m, case[m], n, case[n]) for m, n in combinations(names, 2)}
        cases.append({name: options[name][case[name]] for name in names})
    return cases
