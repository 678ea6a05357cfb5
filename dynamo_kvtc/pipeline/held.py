"""Streams that wait in pinned host memory, verified and tried, until a device decodes them.

Compressed, many more tier blocks wait in the same memory than decoded ones would, and no uncompressed KV
crosses the link. What their bytes can cause shows when they are received: checksums are verified, and the
device inflates and unpacks each stream once for trial, since only that finds what a payload says wrongly.
What the device itself can cause later (no memory, no answer) leaves the CPU, which decodes the same bytes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from dynamo_kvtc.blocking import run_to_end
from dynamo_kvtc.codec.base import Buffer
from dynamo_kvtc.codec.bitstream import StreamHeader
from dynamo_kvtc.codec.geometry import LayerRange
from dynamo_kvtc.codec.paged_codec import REACHED, Completion, PagedBlock, Payload, PendingEncode
from dynamo_kvtc.errors import KvtcError, LayoutError, ObjectMissingError
from dynamo_kvtc.pipeline.adapter import TierAdapter
from dynamo_kvtc.pipeline.boundary import Boundary, Fence
from dynamo_kvtc.pipeline.encoders import Encoder
from dynamo_kvtc.pipeline.landing import Landing
from dynamo_kvtc.pipeline.paged import PagedKvCache
from dynamo_kvtc.tiers.base import TierKey
from dynamo_kvtc.tracebacks import without_frames
from dynamo_kvtc.transfer.allocator import RangeAllocator
from dynamo_kvtc.transfer.memory import MemoryRegion

__all__ = ["HeldLoad", "HeldStreams"]

_log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Held:
    """One stream, or the place for one."""

    start: int
    nbytes: int
    header: StreamHeader | None = None
    payloads: dict[int, memoryview] = field(default_factory=dict)
    #: Its share of the trial, until a load has counted it.
    tried_s: float = 0.0
    loads: int = 0
    released: bool = False


class HeldStreams:
    """A fixed amount of host memory for whole streams. Thread-safe.

    Parameters
    ----------
    boundary : Boundary
        Of the cache that the streams will be decoded into; tries them.
    memory : MemoryRegion
        Pinned where a CUDA device copies from it.
    """

    def __init__(self, boundary: Boundary, memory: MemoryRegion) -> None:
        self.boundary, self._memory = boundary, memory
        self._ranges = RangeAllocator(memory.nbytes)
        self._held: dict[int, _Held] = {}
        self._next = 0
        self._lock = threading.Lock()

    @property
    def capacity(self) -> int:
        """Bytes of the largest stream that fits if nothing else is held."""
        return self._ranges.capacity

    @property
    def taken_bytes(self) -> int:
        """Bytes that slots take."""
        return self._ranges.allocated_bytes

    def reserve(self, nbytes: int) -> int | None:
        """Return a new slot for a stream of this size; None if there is no room."""
        with self._lock:
            start = self._ranges.allocate(nbytes)
            if start is None:
                return None
            self._next += 1
            self._held[self._next] = _Held(start, nbytes)
            return self._next

    def release(self, slot: int) -> None:
        """Give a slot back, once no load reads it any more."""
        with self._lock:
            held = self._held.pop(slot)
            held.released = True
            self._free_unused(held)

    def clear(self) -> None:
        """Give every slot back; see `release`."""
        for slot in list(self._held):
            self.release(slot)

    def _free_unused(self, held: _Held) -> None:
        if held.released and not held.loads:
            self._ranges.free(held.start, held.nbytes)

    def receiver(self, slots: Mapping[TierKey, int]) -> Boundary:
        """Return what an onboard hands its streams to, for these keys."""
        return _Receiver(self, slots)

    def keep(self, slot: int, header: StreamHeader, group: int, payload: Buffer, tried_s: float) -> None:
        """Copy one layer group of a stream into its slot.

        Parameters
        ----------
        tried_s : float
            Seconds that its trial took.

        Raises
        ------
        ObjectMissingError
            If the stream is larger than its slot: another object has taken its place meanwhile.
        """
        held = self._held[slot]
        start, stop = header.group_span(group)
        if stop > held.nbytes:
            raise ObjectMissingError(
                f"the object of {held.nbytes} bytes that was found has been replaced by a larger one"
            )
        view = self._memory.span(held.start + start, stop - start).view
        view[:] = memoryview(payload).cast("B")
        held.header = header
        held.payloads[group] = view
        held.tried_s += tried_s

    def begin_load(self, slots: Sequence[int], block_ids: Sequence[int], cache: PagedKvCache) -> HeldLoad:
        """Begin to read slots; they are kept until the load ends.

        Raises
        ------
        LayoutError
            If there are not as many blocks as the streams' tokens fill.
        """
        with self._lock:
            members = [self._held[slot] for slot in slots]
            load = HeldLoad(self, members, block_ids, cache)
            for held in members:
                held.loads += 1
        return load

    def _end_load(self, members: Sequence[_Held]) -> None:
        with self._lock:
            for held in members:
                held.loads -= 1
                self._free_unused(held)


class _Receiver(Boundary):
    """Tries what an onboard reads, and keeps it as it is."""

    launches = True
    holds = True

    def __init__(self, streams: HeldStreams, slots: Mapping[TierKey, int]) -> None:
        self._streams, self._slots = streams, slots
        self.most_open_tokens = streams.boundary.most_open_tokens

    def begin_encode(
        self,
        cache: PagedKvCache,
        blocks: Sequence[PagedBlock],
        encoder: Encoder,
        after: Fence | None = None,
    ) -> PendingEncode:
        """Refuse: nothing is encoded here."""
        raise LayoutError("streams that are held are encoded already")

    def open_groups(
        self, headers: Sequence[StreamHeader], group: int, payloads: Sequence[Payload]
    ) -> Sequence[Any | KvtcError]:
        """Open one layer group of several streams for trial, and keep the sound ones' bytes."""
        start = time.perf_counter()
        # What the device has opened is dropped here: held, it would take a third of the decoded KV.
        faults = [
            one if isinstance(one, KvtcError) else None
            for one in self._streams.boundary.open_groups(headers, group, payloads)
        ]
        each_s = (time.perf_counter() - start) / max(1, len(headers))
        return [
            fault or self._keep(header, group, payload, each_s)
            for fault, header, payload in zip(faults, headers, payloads, strict=True)
        ]

    def _keep(self, header: StreamHeader, group: int, payload: Payload, tried_s: float) -> int | KvtcError:
        assert not isinstance(payload, torch.Tensor)  # it has no device staging
        try:
            self._streams.keep(self._slots[header.binding], header, group, payload, tried_s)
        except KvtcError as error:
            return error
        return group

    def join(self, parts: Sequence[Any]) -> list[Any]:
        """Return the parts as they are."""
        return list(parts)

    def scatter(
        self,
        parts: Sequence[Any],
        layers: LayerRange,
        cache: PagedKvCache,
        block_ids: Sequence[int],
        after: Fence | None = None,
    ) -> list[Completion]:
        """Write nothing: what was opened waits in its slots."""
        return [REACHED] * layers.count


class HeldLoad:
    """One load of held streams into the engine's blocks, behind the fence of the time when it began.

    Raises
    ------
    LayoutError
        If a slot holds no whole stream, or the streams do not fill the blocks.
    """

    def __init__(
        self, streams: HeldStreams, members: Sequence[_Held], block_ids: Sequence[int], cache: PagedKvCache
    ) -> None:
        self._streams, self._members, self._cache = streams, members, cache
        self._after = cache.fenced
        self._headers: list[StreamHeader] = []
        self._blocks: list[Sequence[int]] = []
        start = 0
        for held in members:
            if held.header is None or len(held.payloads) < len(held.header.layer_groups):
                raise LayoutError("a slot that holds no whole stream cannot be loaded")
            stop = start + held.header.num_tokens // cache.block_size
            self._headers.append(held.header)
            self._blocks.append(block_ids[start:stop])
            start = stop
        if start != len(block_ids):
            raise LayoutError(f"the streams fill {start} blocks, {len(block_ids)} were given")

    async def run(self, adapter: TierAdapter) -> int:
        """Decode everything and wait until it is in place; to be run once, on the adapter's event loop.

        What it takes, with the trial before it, is how fast these streams are decoded: see `Speeds.decoded`.

        Returns
        -------
        int
            Bytes of KV that were put in place.

        Raises
        ------
        KvtcError
            If neither the device nor the CPU could do it.
        """
        start = time.perf_counter()
        try:
            try:
                await self._decode(adapter, self._streams.boundary)
            except Exception as error:
                failure: Exception | None = without_frames(error)
            else:
                failure = None
            if failure is not None:
                _log.warning("the CPU decodes what the device has failed to load: %s", failure)
                await self._decode(adapter, adapter.boundaries.host)
        finally:
            self.end()
        written = sum(block >= 0 for blocks in self._blocks for block in blocks)
        tokens = written * self._cache.block_size
        if failure is None:
            seconds = time.perf_counter() - start + self._take_tried_s()
            adapter.costs.speeds.decoded(tokens, seconds, adapter.encoders.name_of(self._headers))
        return tokens * self._cache.geometry.token_bytes

    def _take_tried_s(self) -> float:
        """Return the seconds of the trials that no load has counted; this one has now."""
        seconds = sum(held.tried_s for held in self._members)
        for held in self._members:
            held.tried_s = 0.0
        return seconds

    def end(self) -> None:
        """Let the slots be given back; to be called if `run` is not."""
        self._streams._end_load(self._members)

    async def _decode(self, adapter: TierAdapter, boundary: Boundary) -> None:
        landing = Landing(adapter.decode_threads)
        try:
            for group, layers in enumerate(adapter.codec.layer_groups):
                for batch in self._batches(boundary.most_open_tokens):
                    work = partial(self._launch, adapter, boundary, group, layers, batch)
                    completions = await run_to_end(adapter.decode_threads, work)
                    landing.add(layers, completions, lambda _: None)
            await landing.end()
        finally:
            # Nobody else may write these blocks, the CPU included, while the device may.
            await landing.settle()

    def _batches(self, most_tokens: int | None) -> Iterator[slice]:
        start = tokens = 0
        for index, header in enumerate(self._headers):
            if index > start and most_tokens is not None and tokens + header.num_tokens > most_tokens:
                yield slice(start, index)
                start, tokens = index, 0
            tokens += header.num_tokens
        yield slice(start, len(self._headers))

    def _launch(
        self, adapter: TierAdapter, boundary: Boundary, group: int, layers: LayerRange, batch: slice
    ) -> list[Completion]:
        with adapter.counters.timed("decode"):
            payloads = [held.payloads[group] for held in self._members[batch]]
            opened = boundary.open_groups(self._headers[batch], group, payloads)
            for one in opened:
                if isinstance(one, KvtcError):
                    raise one
            block_ids = [block for blocks in self._blocks[batch] for block in blocks]
            return boundary.scatter(boundary.join(opened), layers, self._cache, block_ids, self._after)
