"""What the spec's two sides share: open tiers, and a buffer that promised chunks wait in.

vLLM cannot be told that a load failed once it has been promised. So a chunk is promised only when it has been
read, verified and decoded into a buffer of plain host memory; loading it is a copy.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.pipeline.chunk_store import ChunkStore
from dynamo_kvtc.pipeline.paged import PagedKvCache
from dynamo_kvtc.pipeline.threaded import ThreadedTierAdapter
from dynamo_kvtc.policy import OffloadPolicy

__all__ = ["SharedTiers", "find_shared", "make_buffer", "publish_shared"]


@dataclass(slots=True)
class SharedTiers:
    """Open tiers of one engine.

    Attributes
    ----------
    cache : PagedKvCache
        The engine's own.
    buffer : PagedKvCache
        Plain host memory; slot i is the blocks of one chunk.
    store : ChunkStore
        Loads into the buffer.
    policy : OffloadPolicy
        What is worth storing.
    salt : bytes
        Part of every key.
    slots : int
        Chunks that the buffer holds.
    blocks_per_chunk : int
        Blocks of the engine in a chunk.
    """

    adapter: ThreadedTierAdapter
    cache: PagedKvCache
    buffer: PagedKvCache
    store: ChunkStore
    policy: OffloadPolicy
    salt: bytes
    slots: int
    blocks_per_chunk: int

    def close(self) -> None:
        """Close the tiers. Idempotent."""
        self.store.close()
        with _LOCK:
            for engine_id in [name for name, shared in _OPEN.items() if shared is self]:
                del _OPEN[engine_id]


_OPEN: dict[str, SharedTiers] = {}
_LOCK = threading.Lock()


def publish_shared(engine_id: str, shared: SharedTiers) -> None:
    """Let the scheduler's side find the tiers that the worker's side has opened."""
    with _LOCK:
        earlier = _OPEN.pop(engine_id, None)
        _OPEN[engine_id] = shared
    if earlier is not None:
        earlier.close()


def find_shared(engine_id: str) -> SharedTiers:
    """Return the tiers of an engine.

    Raises
    ------
    ConfigError
        If no worker of this process has opened them.
    """
    with _LOCK:
        shared = _OPEN.get(engine_id)
    if shared is None:
        raise ConfigError(
            "the worker runs in another process than the scheduler, and KvtcOffloadingSpec needs both in "
            "one: remove --distributed-executor-backend, or use KvtcTier below TieringOffloadingSpec"
        )
    return shared


def make_buffer(cache: PagedKvCache, num_blocks: int) -> PagedKvCache:
    """Return a cache of plain host memory like the engine's; pinned where there is a GPU."""
    geometry = cache.geometry
    shape = (2, num_blocks, cache.block_size, geometry.num_kv_heads, geometry.head_size)
    pin = torch.cuda.is_available()
    layers = [
        torch.zeros(shape, dtype=geometry.torch_dtype, pin_memory=pin) for _ in range(geometry.num_layers)
    ]
    return PagedKvCache.from_layers(layers, "2BNHD")
