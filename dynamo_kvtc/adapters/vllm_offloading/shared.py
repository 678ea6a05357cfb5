"""What the spec's two sides share: open tiers, and a buffer that promised chunks wait in.

vLLM cannot be told that a load failed once it has been promised. So a chunk is promised only when it is in
the buffer (`dynamo_kvtc.pipeline.load_buffer`), and nothing that its bytes can cause may fail any more.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.pipeline.chunk_store import ChunkStore
from dynamo_kvtc.pipeline.load_buffer import LoadBuffer
from dynamo_kvtc.pipeline.paged import PagedKvCache
from dynamo_kvtc.pipeline.threaded import ThreadedTierAdapter
from dynamo_kvtc.policy import OffloadPolicy

__all__ = ["SharedTiers", "find_shared", "publish_shared"]


@dataclass(slots=True)
class SharedTiers:
    """Open tiers of one engine.

    Attributes
    ----------
    cache : PagedKvCache
        The engine's own.
    buffer : LoadBuffer
        What promised chunks wait in.
    store : ChunkStore
        Loads into the buffer.
    policy : OffloadPolicy
        What is worth storing.
    salt : bytes
        Part of every key.
    blocks_per_chunk : int
        Blocks of the engine in a chunk.
    """

    adapter: ThreadedTierAdapter
    cache: PagedKvCache
    buffer: LoadBuffer
    store: ChunkStore
    policy: OffloadPolicy
    salt: bytes
    blocks_per_chunk: int

    def close(self) -> None:
        """Close the tiers. Idempotent."""
        self.buffer.close()
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
