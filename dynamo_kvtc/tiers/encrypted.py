"""Encryption at rest: a tier around another tier, which sees sealed objects only.

Owns: keys, sealing and opening, and staging memory for the sealed bytes. Does not own: where they live. The
form of an object is `dynamo_kvtc.tiers.encryption_format`'s.

The inner tier knows an object by its *name*: the tier key with the id of the master key folded in. What was
sealed with a key that is not there has a name that nobody asks for, so it is a miss from the start. With
several keys an object may be under any of their names; the key that encrypts is tried first.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from dynamo_kvtc.blocking import run_all, run_to_end
from dynamo_kvtc.errors import (
    KvtcError,
    ObjectCorruptError,
    ObjectMissingError,
    TierClosedError,
    TransferTimeoutError,
)
from dynamo_kvtc.tiers import encryption_format as form
from dynamo_kvtc.tiers.base import KEY_BYTES, OnChange, ReadRequest, Tier, TierKey, TierStats
from dynamo_kvtc.tiers.encryption_keys import KeyRing
from dynamo_kvtc.transfer import MemorySpan, StagingPool

__all__ = ["EncryptedTier"]

#: Keys that a lookup works on before it lets others use the event loop.
_KEYS_PER_TURN = 512

#: Headers that are remembered, so that an object's second read needs one transfer only: 150 bytes each.
_MOST_HEADERS = 65_536


@dataclass(frozen=True, slots=True)
class _Read:
    """One read with the name of its object and the frames that it needs."""

    request: ReadRequest
    name: TierKey
    frames: form.Frames


class _DoesNotOpenError(ObjectCorruptError):
    def __init__(self, name: TierKey, message: str) -> None:
        super().__init__(message)
        self.name = name


class EncryptedTier(Tier):
    """Seals what goes into a tier and opens what comes out; what does not authenticate is a miss.

    Sizes, offsets and ranges are those of plain objects; capacity and statistics are the inner tier's, of
    sealed ones. Owns the inner tier and `staging`: `close` closes them.

    Parameters
    ----------
    inner : Tier
        Keeps the sealed objects.
    ring : KeyRing
        The keys.
    staging : StagingPool
        Memory for sealed bytes on their way, used by nothing else: whoever calls holds leases of the
        other pool, and two users of one pool could wait for each other.
    threads : int
        Threads that seal and open.
    """

    def __init__(self, inner: Tier, ring: KeyRing, staging: StagingPool, *, threads: int = 2) -> None:
        self.name = inner.name
        self.inner = inner
        self._ring, self._staging = ring, staging
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="kvtc-seal")
        #: By names, as all that follows.
        self._headers: OrderedDict[TierKey, bytes] = OrderedDict()
        #: Objects that did not authenticate and cannot be dropped yet, since somebody holds them.
        self._refused: set[TierKey] = set()
        #: By key, the names that its pins hold.
        self._pins: dict[TierKey, list[TierKey]] = {}
        self._lookups = self._hits = 0
        self._corrupt_dropped = 0
        self._closed = False
        self._on_change: OnChange | None = None
        inner.watch(self._changed)

    async def contains_prefix(self, keys: Sequence[TierKey]) -> int:
        """Return how many leading `keys` are stored whole; see `Tier.contains_prefix`."""
        runs: list[Sequence[TierKey]] = []
        count = 0
        while count < len(keys):
            # A prefix whose blocks were sealed with different keys is found in pieces, as is a long one.
            run = await self._longest_run(keys[count : count + _KEYS_PER_TURN])
            if not run:
                break
            runs.append(run)
            count += len(run)
            if count < len(keys):
                await asyncio.sleep(0)
        if len(runs) > 1:
            # The far end of a prefix is evicted before its beginning, so that is touched last.
            for run in reversed(runs):
                await self.inner.contains_prefix(run)
        self._lookups += len(keys)
        self._hits += count
        return count

    async def _longest_run(self, keys: Sequence[TierKey]) -> Sequence[TierKey]:
        """Return the longest run of names, all of one master key, that are stored and can be read."""
        names = [[form.stored_key(key, key_id) for key in keys] for key_id in self._ring.ids]
        if len(names) == 1:
            counts = [await self.inner.contains_prefix(names[0])]
        else:
            counts = await asyncio.gather(*map(self.inner.contains_prefix, names))
        runs = [
            one[: next((index for index in range(count) if self._plain_size(one[index]) is None), count)]
            for one, count in zip(names, counts, strict=True)
        ]
        return max(runs, key=len)

    def size_of(self, key: TierKey) -> int | None:
        """Return the plain size of an object in bytes, or None."""
        name = self._find(key)
        return None if name is None else self._plain_size(name)

    def _find(self, key: TierKey) -> TierKey | None:
        """Return the name under which an object that can be read is stored."""
        names = (form.stored_key(key, key_id) for key_id in self._ring.ids)
        return next((name for name in names if self._plain_size(name) is not None), None)

    def _plain_size(self, name: TierKey) -> int | None:
        if name in self._refused:
            return None
        sealed = self.inner.size_of(name)
        return None if sealed is None else form.plain_size(sealed)

    async def put(self, key: TierKey, source: MemorySpan, *, timeout_s: float) -> bool:
        """Seal and store an object; see `Tier.put`."""
        if len(key) != KEY_BYTES or source.nbytes < 1:
            raise ValueError(
                f"a key has {KEY_BYTES} bytes and an object at least one: {len(key)}, {source.nbytes}"
            )
        with self._explain_closed():
            return await self._put(key, source, time.monotonic() + timeout_s)

    async def _put(self, key: TierKey, source: MemorySpan, deadline: float) -> bool:
        if self._find(key) is not None:
            return False
        name = form.stored_key(key, self._ring.ids[0])
        if self.inner.size_of(name) is not None and not await self._drop(name):
            return False  # what is there cannot be read, and is held by somebody
        async with self._staging.lease(form.sealed_size(source.nbytes), _left(deadline)) as span:
            header = form.new_header(self._ring)
            cipher = form.header_cipher(header, key, self._ring)
            await self._run(partial(form.seal, cipher, header, key, source.view, span.view))
            stored = await self.inner.put(name, span, timeout_s=_left(deadline))
        if stored:
            self._remember(name, header)
        return stored

    async def get(self, reads: Sequence[ReadRequest], *, timeout_s: float) -> None:
        """Read and open byte ranges; see `Tier.get`."""
        with self._explain_closed():
            await self._get(reads, time.monotonic() + timeout_s)

    async def _get(self, reads: Sequence[ReadRequest], deadline: float) -> None:
        located = [self._locate(read) for read in reads]
        for batch in self._batches(located):
            try:
                remembered = await self._read_headers({one.name for one in batch}, deadline)
                await self._read_frames(batch, deadline)
            except _DoesNotOpenError as error:
                if error.name not in remembered:
                    self._refuse(error.name)
                    raise
                # Another worker may have replaced the object whose header was remembered.
                self._headers.pop(error.name, None)
                await self._get([one.request for one in batch], deadline)

    @contextmanager
    def _explain_closed(self) -> Iterator[None]:
        """Once the tier is closed, whatever comes of a call is that it was closed."""
        if self._closed:
            raise TierClosedError(f"the {self.name} tier is closed")
        try:
            yield
        except KvtcError as error:
            if self._closed:
                raise TierClosedError(f"the {self.name} tier was closed during the call") from error
            raise

    def _locate(self, read: ReadRequest) -> _Read:
        name = self._find(read.key)
        size = None if name is None else self._plain_size(name)
        if name is None or size is None:
            raise ObjectMissingError(f"no object {read.key.hex()} in the {self.name} tier")
        if read.offset < 0:
            raise ValueError(f"cannot read from offset {read.offset}")
        if read.offset + read.into.nbytes > size:
            self._refuse(name)
            raise ObjectCorruptError(
                f"object {read.key.hex()} in the {self.name} tier has {size} bytes, its reader needs bytes "
                f"up to {read.offset + read.into.nbytes}; it is a miss"
            )
        return _Read(read, name, form.Frames.holding(size, read.offset, read.into.nbytes))

    def _batches(self, reads: Sequence[_Read]) -> Iterable[list[_Read]]:
        """Cut reads into batches whose sealed bytes fit into the staging memory."""
        batch: list[_Read] = []
        total = 0
        for read in reads:
            nbytes = read.frames.sealed_bytes
            if batch and total + nbytes > self._staging.nbytes:
                yield batch
                batch, total = [], 0
            batch.append(read)
            total += nbytes
        if batch:
            yield batch

    async def _read_headers(self, names: set[TierKey], deadline: float) -> set[TierKey]:
        """Read the headers that are not remembered; returns the names of those that are."""
        unknown = [name for name in names if name not in self._headers]
        if not unknown:
            return names
        async with self._staging.lease(form.HEADER_BYTES * len(unknown), _left(deadline)) as span:
            spans = [span.slice(i * form.HEADER_BYTES, form.HEADER_BYTES) for i in range(len(unknown))]
            reads = [ReadRequest(name, 0, into) for name, into in zip(unknown, spans, strict=True)]
            await self.inner.get(reads, timeout_s=_left(deadline))
            for name, into in zip(unknown, spans, strict=True):
                self._remember(name, bytes(into.view))
        return names.difference(unknown)

    async def _read_frames(self, batch: list[_Read], deadline: float) -> None:
        total = sum(read.frames.sealed_bytes for read in batch)
        if not total:
            return
        headers = [self._headers.get(read.name) for read in batch]
        if None in headers:
            raise ObjectMissingError(f"an object went from the {self.name} tier while it was read")
        async with self._staging.lease(total, _left(deadline)) as span:
            spans, offset = [], 0
            for read in batch:
                spans.append(span.slice(offset, read.frames.sealed_bytes))
                offset += read.frames.sealed_bytes
            sealed = [
                ReadRequest(read.name, read.frames.sealed_offset, into)
                for read, into in zip(batch, spans, strict=True)
                if into.nbytes
            ]
            await self.inner.get(sealed, timeout_s=_left(deadline))
            works = [
                partial(self._open, read, header or b"", into)
                for read, header, into in zip(batch, headers, spans, strict=True)
            ]
            await run_all(self._executor, works)

    def _open(self, read: _Read, header: bytes, sealed: MemorySpan) -> None:
        request, key = read.request, read.request.key
        try:
            cipher = form.header_cipher(header, key, self._ring)
            skip = request.offset - read.frames.plain_offset
            form.open_frames(cipher, header, key, read.frames, sealed.view, skip, request.into.view)
        except ObjectCorruptError as error:
            raise _DoesNotOpenError(read.name, str(error)) from error

    # --- objects that do not authenticate ---------------------------------------------------------

    def _refuse(self, name: TierKey) -> None:
        self._refused.add(name)
        self._headers.pop(name, None)
        self._corrupt_dropped += 1

    async def _drop(self, name: TierKey) -> bool:
        if not await self.inner.evict([name]):
            return False
        self._refused.discard(name)
        return True

    def _remember(self, name: TierKey, header: bytes) -> None:
        self._headers[name] = header
        self._headers.move_to_end(name)
        while len(self._headers) > _MOST_HEADERS:
            self._headers.popitem(last=False)

    # --- the rest ---------------------------------------------------------------------------------

    def pin(self, keys: Iterable[TierKey]) -> list[TierKey]:
        """See `Tier.pin`."""
        pinned = []
        for key in keys:
            name = self._find(key)
            if name is not None and self.inner.pin([name]):
                self._pins.setdefault(key, []).append(name)
                pinned.append(key)
        return pinned

    def unpin(self, keys: Iterable[TierKey]) -> None:
        """See `Tier.unpin`."""
        for key in keys:
            names = self._pins.get(key)
            if names:
                self.inner.unpin([names.pop()])
                if not names:
                    del self._pins[key]

    def prefer(self, keys: Iterable[TierKey], times: int) -> None:
        """See `Tier.prefer`."""
        names = (self._find(key) for key in keys)
        self.inner.prefer([name for name in names if name is not None], times)

    async def evict(self, keys: Iterable[TierKey]) -> int:
        """See `Tier.evict`."""
        names = {
            key: [
                name
                for name in (form.stored_key(key, key_id) for key_id in self._ring.ids)
                if self.inner.size_of(name) is not None
            ]
            for key in keys
        }
        await self.inner.evict(name for those in names.values() for name in those)
        return sum(
            bool(those) and all(self.inner.size_of(name) is None for name in those)
            for those in names.values()
        )

    async def clear(self) -> None:
        """See `Tier.clear`."""
        await self.inner.clear()

    def watch(self, on_change: OnChange) -> None:
        """See `Tier.watch`.

        A name does not tell which key it was made with. So with several keys, those that it would be with
        the others are told of, too; they are nobody's.
        """
        self._on_change = on_change

    def _changed(self, name: TierKey, stored: bool) -> None:
        # A name may come back with another object.
        self._refused.discard(name)
        if not stored:
            self._headers.pop(name, None)
        if self._on_change is None:
            return
        for key_id in self._ring.ids:
            key = form.stored_key(name, key_id)
            # It stays while it is there under another name.
            if stored or self._find(key) is None:
                self._on_change(key, stored)

    def stats(self) -> TierStats:
        """Return the inner tier's counters, with the objects that did not authenticate among the damaged."""
        stats = self.inner.stats()
        return replace(
            stats,
            lookups=self._lookups,
            hits=self._hits,
            corrupt_dropped=stats.corrupt_dropped + self._corrupt_dropped,
        )

    async def close(self) -> None:
        """Close the inner tier and release everything. Idempotent."""
        if self._closed:
            return
        self._closed = True
        await self.inner.close()
        await self._staging.close()
        self._executor.shutdown(wait=False)

    async def _run(self, work: partial[None]) -> None:
        await run_to_end(self._executor, work)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TransferTimeoutError("the deadline passed while objects were sealed or opened")
    return left
