"""Where tier blocks wait that a host has been promised and will load later.

Some hosts (vLLM's native offloading) take no promise back. What they are promised is brought so far
beforehand that nothing a stored byte can cause may fail any more, and waits within a bound.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from dynamo_kvtc.pipeline.adapter import TierAdapter
from dynamo_kvtc.pipeline.chunk_store import Chunk, chunk_blocks, slot_blocks
from dynamo_kvtc.pipeline.handle import OnboardHandle
from dynamo_kvtc.pipeline.held import HeldStreams
from dynamo_kvtc.pipeline.paged import PagedKvCache
from dynamo_kvtc.pipeline.threaded import ThreadedTierAdapter

__all__ = ["DecodedBuffer", "HeldBuffer", "LoadBuffer", "open_load_buffer"]

_log = logging.getLogger(__name__)


class LoadBuffer(ABC):
    """Slots for promised chunks. All but `fill` is called by the engine's thread."""

    @abstractmethod
    def could_hold(self, nbytes: int) -> bool:
        """Tell whether a chunk whose stored object has `nbytes` bytes fits into the empty buffer."""

    @abstractmethod
    def reserve(self, nbytes: int) -> int | None:
        """Return a slot for a chunk whose stored object has `nbytes` bytes; None if there is no room now."""

    @abstractmethod
    def release(self, slot: int) -> None:
        """Give a slot back, as soon as no load reads it any more."""

    @abstractmethod
    def clear(self) -> None:
        """Give every slot back."""

    @abstractmethod
    def fill(self, adapter: TierAdapter, chunks: Sequence[Chunk]) -> OnboardHandle:
        """Begin to bring stored chunks, consecutive ones, into their slots; on the adapter's event loop."""

    @abstractmethod
    def load(self, slots: Sequence[int], block_ids: Sequence[int]) -> Future[int]:
        """Begin to put promised chunks into the engine's blocks, behind the cache's latest fence.

        Parameters
        ----------
        block_ids : Sequence[int]
            The engine's blocks for all blocks of these chunks; -1 leaves one out.

        Returns
        -------
        Future[int]
            Done when nothing is read or written any more: bytes of KV that were put in place.
        """

    @abstractmethod
    def close(self) -> None:
        """Wait for the loads in progress. Idempotent."""


class DecodedBuffer(LoadBuffer):
    """Chunks decoded into plain host memory; a load is a copy. For caches that the CPU's codec serves.

    Parameters
    ----------
    adapter : ThreadedTierAdapter
        Keys and decodes the chunks.
    cache : PagedKvCache
        The engine's own.
    slots : int
        Chunks that the buffer holds.
    salt : bytes
        Part of every key.
    """

    def __init__(
        self, adapter: ThreadedTierAdapter, cache: PagedKvCache, slots: int, *, salt: bytes = b""
    ) -> None:
        self._cache, self._salt, self._slots = cache, salt, slots
        self._count = adapter.blocks_per_tier_block
        self._free = list(range(slots))
        geometry = cache.geometry
        shape = (2, slots * self._count, cache.block_size, geometry.num_kv_heads, geometry.head_size)
        pin = cache.device.type == "cuda"
        layers = [
            torch.zeros(shape, dtype=geometry.torch_dtype, pin_memory=pin) for _ in range(geometry.num_layers)
        ]
        self._buffer = PagedKvCache.from_layers(layers, "2BNHD")
        self._copies = ThreadPoolExecutor(1, thread_name_prefix="kvtc-copy")

    def could_hold(self, nbytes: int) -> bool:
        """Return True: what is stored decodes to one size; see `LoadBuffer.could_hold`."""
        return True

    def reserve(self, nbytes: int) -> int | None:
        """Return a free slot: all are of one size; see `LoadBuffer.reserve`."""
        return self._free.pop() if self._free else None

    def release(self, slot: int) -> None:
        """Give a slot back; see `LoadBuffer.release`."""
        self._free.append(slot)

    def clear(self) -> None:
        """Give every slot back; see `LoadBuffer.clear`."""
        self._free = list(range(self._slots))

    def fill(self, adapter: TierAdapter, chunks: Sequence[Chunk]) -> OnboardHandle:
        """Begin to decode chunks into their slots; see `LoadBuffer.fill`."""
        return adapter.onboard(slot_blocks(chunks, self._count, self._salt), self._buffer)

    def load(self, slots: Sequence[int], block_ids: Sequence[int]) -> Future[int]:
        """Begin to copy chunks into the engine's blocks; see `LoadBuffer.load`."""
        places = [slot * self._count + part for slot in slots for part in range(self._count)]
        wanted = [pair for pair in zip(places, block_ids, strict=True) if pair[1] >= 0]
        return self._copies.submit(self._copy, [one for one, _ in wanted], [block for _, block in wanted])

    def _copy(self, sources: list[int], blocks: list[int]) -> int:
        keys, values = self._buffer.gather(sources)
        for layer in range(self._cache.geometry.num_layers):
            self._cache.scatter_layer(layer, blocks, keys[:, layer], values[:, layer])
        return keys.nbytes + values.nbytes

    def close(self) -> None:
        """Wait for the copies in progress; see `LoadBuffer.close`."""
        self._copies.shutdown(wait=True)


class HeldBuffer(LoadBuffer):
    """Chunks held compressed, verified and tried, in pinned host memory; a load decodes them on the device.

    Parameters
    ----------
    adapter : ThreadedTierAdapter
        Keys and reads the chunks, and decodes them on its own threads.
    held : HeldStreams
        For the boundary of `cache`.
    cache : PagedKvCache
        The engine's own, on a device that the adapter's codec works on.
    salt : bytes
        Part of every key.
    """

    def __init__(
        self,
        adapter: ThreadedTierAdapter,
        held: HeldStreams,
        cache: PagedKvCache,
        *,
        salt: bytes = b"",
    ) -> None:
        self._adapter, self._cache, self._salt = adapter, cache, salt
        self._count = adapter.blocks_per_tier_block
        self._held = held
        self._loads: set[Future[int]] = set()

    def could_hold(self, nbytes: int) -> bool:
        """Tell whether an object is no larger than the buffer; see `LoadBuffer.could_hold`."""
        return nbytes <= self._held.capacity

    def reserve(self, nbytes: int) -> int | None:
        """Return a slot of this size; see `LoadBuffer.reserve`."""
        return self._held.reserve(nbytes)

    def release(self, slot: int) -> None:
        """Give a slot back; see `LoadBuffer.release`."""
        self._held.release(slot)

    def clear(self) -> None:
        """Give every slot back; see `LoadBuffer.clear`."""
        self._held.clear()

    def fill(self, adapter: TierAdapter, chunks: Sequence[Chunk]) -> OnboardHandle:
        """Begin to read, verify and try chunks; see `LoadBuffer.fill`."""
        namespace = adapter.namespace(self._salt)
        slots = {namespace.key(chunk.hash): chunk.slot for chunk in chunks}
        # No block of the engine is written: the receiver keeps what it is given.
        nowhere = [-1] * (len(chunks) * self._count)
        blocks = chunk_blocks(chunks, nowhere, self._count, self._salt)
        return adapter.onboard(blocks, self._cache, boundary=self._held.receiver(slots))

    def load(self, slots: Sequence[int], block_ids: Sequence[int]) -> Future[int]:
        """Begin to decode chunks into the engine's blocks; see `LoadBuffer.load`."""
        load = self._held.begin_load(slots, block_ids, self._cache)
        try:
            future = self._adapter.start(load.run)
        except BaseException:
            load.end()
            raise
        self._loads.add(future)
        future.add_done_callback(self._loads.discard)
        return future

    def close(self) -> None:
        """Wait for the loads in progress, which have deadlines of their own; see `LoadBuffer.close`."""
        for load in list(self._loads):
            if (error := load.exception()) is not None:
                _log.warning("a load did not end well: %s", error)


def open_load_buffer(
    adapter: ThreadedTierAdapter,
    cache: PagedKvCache,
    nbytes: int,
    chunk_bytes: int,
    *,
    salt: bytes = b"",
) -> LoadBuffer:
    """Return a buffer of `nbytes` bytes for the engine's cache: held streams where a device decodes.

    Parameters
    ----------
    chunk_bytes : int
        Bytes of a chunk's KV as the engine has it.
    """

    async def hold(inner: TierAdapter) -> HeldStreams | None:
        boundary = inner.boundaries.of(cache)
        if not boundary.launches:
            return None
        # The agent frees it when the adapter closes.
        return HeldStreams(boundary, await inner.agent.allocate(nbytes, pinned=cache.device.type == "cuda"))

    held = adapter.run(hold)
    if held is None:
        return DecodedBuffer(adapter, cache, nbytes // chunk_bytes, salt=salt)
    return HeldBuffer(adapter, held, cache, salt=salt)
