"""A paged cache as vLLM lays it out on GPUs, with room for one sequence."""

from __future__ import annotations

import random

import torch

from dynamo_kvtc.codec.geometry import KvGeometry
from dynamo_kvtc.pipeline.paged import PagedKvCache

__all__ = ["make_cache", "shuffled_blocks"]


def make_cache(geometry: KvGeometry, num_blocks: int, block_size: int, device: torch.device) -> PagedKvCache:
    """Return a cache of zeros: per layer ``[blocks, heads, tokens, keys and values]``, tokens before heads.

    These are vLLM's tensors, whose order in memory is ``[blocks, tokens, heads, 2 * head_size]``.
    """
    shape = (num_blocks, block_size, geometry.num_kv_heads, 2 * geometry.head_size)
    halves = [
        torch.split(torch.zeros(shape, dtype=geometry.torch_dtype, device=device), geometry.head_size, dim=-1)
        for _ in range(geometry.num_layers)
    ]
    return PagedKvCache([keys for keys, _ in halves], [values for _, values in halves])


def shuffled_blocks(num_blocks: int) -> list[int]:
    """Return the ids of all blocks, out of order as an engine that has run for a while gives them out."""
    ids = list(range(num_blocks))
    random.Random(0).shuffle(ids)
    return ids
