"""The object tier (G4): objects in an S3 bucket, shared between workers or owned by one.

Without a capacity any number of workers share a prefix. Nobody evicts; the bucket's lifecycle rules expire
objects. A lookup asks the bucket about keys that this worker does not know yet, within `lookup_wait_s`
(see `object_lookup`). With a capacity one worker owns the prefix: it lists it at start and evicts the least
recently used objects. Recency is not kept across restarts.

An object is one PUT, so it is visible only when it is whole, and on condition that there is none yet, so
that the first writer wins. Buckets that ignore the condition are found out at start; they are asked before
each PUT, and of two writers at the same moment the later one wins. Reads are range requests.

Every request has a deadline, and none is repeated by itself. When several fail in a row, a circuit breaker
keeps the tier from asking for a while: lookups then find nothing, and reads and writes fail at once.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

from dynamo_kvtc.blocking import run_to_end
from dynamo_kvtc.errors import (
    MissingDependencyError,
    ObjectCorruptError,
    ObjectMissingError,
    TierError,
    TierFullError,
    TransferError,
    TransferTimeoutError,
)
from dynamo_kvtc.tiers.base import ReadRequest, TierKey, TierStats
from dynamo_kvtc.tiers.breaker import CircuitBreaker
from dynamo_kvtc.tiers.index import Location
from dynamo_kvtc.tiers.indexed import IndexedTier
from dynamo_kvtc.tiers.object_client import AccessDeniedError, BucketClient, BucketMissingError, BucketPlace
from dynamo_kvtc.tiers.object_deletion import Deletions
from dynamo_kvtc.tiers.object_format import HEADER_BYTES, key_of, object_name, pack_object, unpack_object
from dynamo_kvtc.tiers.object_gate import RequestGate
from dynamo_kvtc.tiers.object_lookup import BucketLookup
from dynamo_kvtc.tiers.object_transport import ClientTransport, NixlTransport, ObjectTransport
from dynamo_kvtc.transfer import MemorySpan

__all__ = ["ObjectSettings", "ObjectTier"]

_log = logging.getLogger(__name__)

#: What `TierStats.capacity_bytes` says of a tier without one.
_UNBOUNDED = 2**62

_CLOSE_TIMEOUT_S = 5.0
_PACK_THREADS = 2


@dataclass(frozen=True, slots=True)
class ObjectSettings:
    """How an object tier uses its bucket.

    Attributes
    ----------
    timeout_s : float
        Deadline of one request.
    lookup_wait_s : float
        How long a lookup waits for the bucket; the answers that come later serve the next lookup.
    miss_ttl_s : float
        How long a key that was missing is not asked for again.
    max_requests : int
        Requests in flight; further ones wait, within their deadlines.
    transport : str
        ``"nixl"``: NIXL's OBJ backend; ``"client"``: the asynchronous client; ``"auto"``: NIXL's if it loads.
    transport_bytes : int
        Registered memory of NIXL's OBJ backend; larger ranges than this come over the client.
    most_known : int
        Objects of a shared prefix that the index remembers; the least recently used are forgotten first.
    """

    timeout_s: float = 10.0
    lookup_wait_s: float = 0.05
    miss_ttl_s: float = 5.0
    max_requests: int = 32
    transport: Literal["auto", "nixl", "client"] = "auto"
    transport_bytes: int = 64 << 20
    most_known: int = 1_000_000


class _StoredAlreadyError(TierError):
    """The bucket held the object before this put."""

    def __init__(self, nbytes: int) -> None:
        super().__init__(f"the bucket has an object of {nbytes} bytes")
        self.nbytes = nbytes


class ObjectTier(IndexedTier):
    """Objects below a prefix of a bucket. Make one with `open`."""

    def __init__(
        self,
        client: BucketClient,
        transport: ObjectTransport,
        capacity_bytes: int | None,
        settings: ObjectSettings,
        name: str,
    ) -> None:
        super().__init__(name, _UNBOUNDED if capacity_bytes is None else capacity_bytes)
        self._shared = capacity_bytes is None
        self._client, self._transport, self._settings = client, transport, settings
        self._conditional = True
        self._reserved = 0
        self._threads = ThreadPoolExecutor(_PACK_THREADS, thread_name_prefix="kvtc-object")
        self._deletions = Deletions(self._delete)
        self._lookup = BucketLookup(self._ask, self._note_found, miss_ttl_s=settings.miss_ttl_s)
        self._gate = RequestGate(client.place.description, settings.max_requests, settings.timeout_s)

    @classmethod
    async def open(
        cls,
        place: BucketPlace,
        capacity_bytes: int | None = None,
        *,
        settings: ObjectSettings | None = None,
        name: str = "object",
    ) -> ObjectTier:
        """Try the bucket, and list the prefix if this worker owns it.

        Parameters
        ----------
        capacity_bytes : int, optional
            Bytes that the prefix may take; then no other worker may write to it. None shares it.

        Raises
        ------
        MissingDependencyError
            If obstore is not installed.
        TierError
            If the bucket does not exist or denies access; with a capacity, also if it does not answer.
        """
        settings = settings or ObjectSettings()
        client = BucketClient(place, settings.timeout_s)
        transport = await _open_transport(client, settings)
        tier = cls(client, transport, capacity_bytes, settings, name)
        try:
            await tier._try_bucket()
            if not tier._shared:
                await tier._adopt()
        except BaseException as error:
            await tier.close()
            if isinstance(error, TransferError):
                raise TierError(f"cannot use {place.description} for the {name} tier: {error}") from error
            raise
        return tier

    @property
    def breaker(self) -> CircuitBreaker:
        """Whether the bucket is being left alone."""
        return self._gate.breaker

    @property
    def transport(self) -> str:
        """Which transport moves the bytes."""
        return self._transport.name

    async def _try_bucket(self) -> None:
        """Write one small object twice: shows access, and whether the first writer wins."""
        name, limit = f"probe/{secrets.token_hex(8)}", self._settings.timeout_s
        try:
            async with self._gate.request(time.monotonic() + 3 * limit):
                await self._client.put(name, b"probe", limit, only_new=True)
                self._conditional = not await self._client.put(name, b"probe", limit, only_new=True)
                await self._client.delete([name], limit)
        except (AccessDeniedError, BucketMissingError):
            raise
        except TransferError as error:
            if not self._shared:
                raise
            _log.warning("%s does not answer, starting without it: %s", self._client.place.description, error)
            return
        if not self._conditional:
            _log.warning(
                "%s ignores If-None-Match: of two writers of one key the later one wins",
                self._client.place.description,
            )

    async def _adopt(self) -> None:
        """Take over the objects that an owned prefix holds."""
        async for page in self._client.list_sizes(self._settings.timeout_s):
            for name, nbytes in page:
                key = key_of(name)
                if key is not None and nbytes > HEADER_BYTES and key not in self._index:
                    self._index.add(key, Location(0, 0, nbytes - HEADER_BYTES))
        while self._allocated() > self._capacity_bytes and self._evict_one():
            pass

    # --- looking up --------------------------------------------------------------------------------

    async def contains_prefix(self, keys: Sequence[TierKey]) -> int:
        """Return how many leading `keys` are stored whole; asks the bucket about unknown ones, briefly."""
        self._check_usable()
        count = 0
        if self.breaker.state != "open":
            count = self._index.touch_prefix(keys)
            if self._shared and count < len(keys):
                await self._lookup.extend(keys[count:], self._settings.lookup_wait_s)
                self._explain_closed(None)
                count = self._index.touch_prefix(keys)
        self._lookups += len(keys)
        self._hits += count
        return count

    def size_of(self, key: TierKey) -> int | None:
        """Return the size of an object that this worker knows of; None while the bucket is left alone."""
        return None if self.breaker.state == "open" else super().size_of(key)

    async def _ask(self, key: TierKey) -> int | None:
        deadline = time.monotonic() + self._settings.timeout_s
        async with self._gate.request(deadline) as left:
            nbytes = await self._client.head(object_name(key), left)
        return None if nbytes is None or nbytes <= HEADER_BYTES else nbytes - HEADER_BYTES

    def _note_found(self, key: TierKey, nbytes: int) -> None:
        if key in self._index or key in self._writing:
            return
        self._index.add(key, Location(0, 0, nbytes))
        self._tell(key, True)
        if self._shared and len(self._index) > self._settings.most_known:
            for oldest in self._index.oldest_first():
                if self._may_evict(oldest):
                    self._index.remove(oldest)
                    self._tell(oldest, False)
                    break

    # --- storing -----------------------------------------------------------------------------------

    async def put(self, key: TierKey, source: MemorySpan, *, timeout_s: float) -> bool:
        """Store an object unless the bucket has it; see `Tier.put`."""
        try:
            return await super().put(key, source, timeout_s=timeout_s)
        except _StoredAlreadyError as error:
            self._note_found(bytes(key), error.nbytes)
            return False

    async def _store(self, key: TierKey, source: MemorySpan, timeout_s: float) -> Location:
        deadline = time.monotonic() + timeout_s
        size = HEADER_BYTES + source.nbytes
        self._make_room(size)
        self._reserved += size
        name = object_name(key)
        try:
            if not await self._deletions.settled(key, timeout_s):
                raise TransferTimeoutError(f"the old object {name} is still being deleted")
            async with self._gate.request(deadline) as left:
                packed = await run_to_end(self._threads, lambda: pack_object(key, source.view))
                written = await self._transport.write(name, packed, left, conditional=self._conditional)
                there = size if written else await self._client.head(name, left)
        finally:
            self._reserved -= size
        self._lookup.note_stored(key)
        if not written:
            raise _StoredAlreadyError((there or size) - HEADER_BYTES)
        return Location(0, 0, source.nbytes)

    def _make_room(self, size: int) -> None:
        if size > self._capacity_bytes:
            raise TierFullError(
                f"an object of {size} bytes exceeds the {self.name} tier of {self._capacity_bytes} bytes"
            )
        while self._allocated() + size > self._capacity_bytes:
            if not self._evict_one():
                raise TierFullError(
                    f"no room for {size} bytes in the {self.name} tier: what is left is pinned or in use"
                )

    # --- reading -----------------------------------------------------------------------------------

    async def _load(self, reads: Sequence[tuple[ReadRequest, Location]], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        tasks = [
            asyncio.ensure_future(self._load_one(read, location.nbytes, deadline)) for read, location in reads
        ]
        try:
            await asyncio.wait(tasks)
        except asyncio.CancelledError:
            # The destinations are somebody else's as soon as this call is over.
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise
        failures = [error for task in tasks if (error := task.exception()) is not None]
        if failures:
            raise failures[0]

    async def _load_one(self, read: ReadRequest, size: int, deadline: float) -> None:
        whole = read.into.nbytes == size
        offset = 0 if whole else HEADER_BYTES + read.offset
        nbytes = HEADER_BYTES + size if whole else read.into.nbytes
        try:
            async with (
                self._gate.request(deadline) as left,
                self._transport.fetch(object_name(read.key), offset, nbytes, left) as found,
            ):
                await run_to_end(self._threads, lambda: _take(read, found, whole=whole))
        except ObjectMissingError:
            # Expired, or deleted by another worker.
            if read.key in self._index:
                self._pins.pop(read.key, None)
                self._index.remove(read.key)
                self._tell(read.key, False)
            self._lookup.note_missing(read.key)
            raise
        except ObjectCorruptError as error:
            self._drop_corrupt(read.key)
            raise ObjectCorruptError(f"{error}; it was dropped from the {self.name} tier") from error

    # --- deleting ----------------------------------------------------------------------------------

    def _evict(self, key: TierKey) -> None:
        self._index.remove(key)
        self._evictions += 1
        self._forget(key)

    def _drop_corrupt(self, key: TierKey) -> None:
        """Delete a damaged object, read or not: it can then be stored anew, by whichever worker."""
        if key in self._index:
            self._index.remove(key)
            self._pins.pop(key, None)
            self._corrupt_dropped += 1
            self._forget(key)

    def _forget(self, key: TierKey) -> None:
        self._tell(key, False)
        self._lookup.note_missing(key)
        if not self._closed:
            self._deletions.add(bytes(key))

    async def _delete(self, keys: Sequence[TierKey]) -> None:
        async with self._gate.request(time.monotonic() + self._settings.timeout_s) as left:
            await self._client.delete([object_name(key) for key in keys], left)

    def _reclaim(self, location: Location) -> None:
        """Nothing to do: a bucket has no places, objects are deleted by their names."""

    def _allocated(self) -> int:
        return self._index.stored_bytes + HEADER_BYTES * len(self._index) + self._reserved

    def _space(self) -> tuple[int, int]:
        allocated = self._allocated()
        return allocated, max(0, self._capacity_bytes - allocated)

    def stats(self) -> TierStats:
        """Return the counters, with what the breaker did."""
        paused = int(self.breaker.state == "open")
        return replace(super().stats(), pauses=self.breaker.openings, paused=paused)

    async def close(self) -> None:
        """Finish deletions, for a while; the objects stay in the bucket. Idempotent."""
        if self._closed:
            return
        self._closed = True
        await self._lookup.close()
        await self._deletions.close(_CLOSE_TIMEOUT_S)
        await self._transport.close()
        self._threads.shutdown(wait=False)


async def _open_transport(client: BucketClient, settings: ObjectSettings) -> ObjectTransport:
    if settings.transport == "client":
        return ClientTransport(client)
    try:
        return await NixlTransport.open(client, settings.transport_bytes)
    except (TransferError, MissingDependencyError) as error:
        if settings.transport == "nixl":
            raise TierError(f"{error}; or set transport: client") from error
        _log.info("objects are read by the client: %s", error)
        return ClientTransport(client)


def _take(read: ReadRequest, found: memoryview, *, whole: bool) -> None:
    if whole:
        unpack_object(read.key, found, read.into.view)
    else:
        read.into.view[:] = found
