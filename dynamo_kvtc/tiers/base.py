"""The contract of a tier: bytes under keys, in registered memory, with deadlines.

Tiers speak bytes and keys, never tensors. What is inside an object is the codec's business.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

from dynamo_kvtc.transfer.memory import MemorySpan

__all__ = [
    "KEY_BYTES",
    "TENANT_BYTES",
    "Gate",
    "Namespace",
    "OnChange",
    "ReadRequest",
    "Tier",
    "TierKey",
    "TierStats",
    "tenant_of",
]

#: Bytes of a tier key: a BLAKE2b digest, then the tenant's tag.
KEY_BYTES = 32

#: Bytes of the tag at a key's end: a digest of the salt alone, which an encrypted tier derives the tenant's
#: key from. It tells which objects belong to one tenant, not to whom.
TENANT_BYTES = 8

#: A tier key. Opaque to tiers; derived by `Namespace.key`.
TierKey = bytes


#: Told of a key, and whether its object became visible (True) or went (False).
OnChange = Callable[[TierKey, bool], None]


@dataclass(frozen=True, slots=True)
class Namespace:
    """Everything a tier block's key depends on besides its sequence hash.

    Two workers share objects exactly if all of this agrees.

    Attributes
    ----------
    artifact_id : bytes
        Content id of the artifact (zeros for raw objects).
    layout : str
        What the bytes mean: geometry, dtype, tokens per tier block, head shard, as one canonical string.
    salt : bytes
        The tenant's or request's salt; empty for none.
    """

    artifact_id: bytes
    layout: str
    salt: bytes = b""

    def key(self, sequence_hash: bytes) -> TierKey:
        """Derive the key of the tier block whose last block has this sequence hash."""
        digest = hashlib.blake2b(digest_size=KEY_BYTES - TENANT_BYTES, person=b"kvtc-tier-key")
        for part in (self.artifact_id, self.layout.encode(), self.salt, sequence_hash):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
        return digest.digest() + _tenant_tag(self.salt)


@lru_cache(4096)
def _tenant_tag(salt: bytes) -> bytes:
    return hashlib.blake2b(salt, digest_size=TENANT_BYTES, person=b"kvtc-tenant").digest()


def tenant_of(key: TierKey) -> bytes:
    """Return the tenant's tag of a key."""
    return key[-TENANT_BYTES:]


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """Read ``into.nbytes`` bytes from `offset` of one object into registered memory."""

    key: TierKey
    offset: int
    into: MemorySpan


@dataclass(frozen=True, slots=True)
class TierStats:
    """A tier's counters since it was opened, and its present fill.

    ``lookups`` counts keys asked for in `contains_prefix`, the denominator of ``hits``. ``not_admitted``
    counts objects that a gate in front of the tier kept out, or that were dropped on their way to it, by
    reason; ``waiting`` is how many are on their way. ``pauses`` counts how often the tier was left alone
    because it kept failing or timing out; ``paused`` is 1 while it is passed over for that.
    """

    objects: int
    stored_bytes: int
    capacity_bytes: int
    allocated_bytes: int
    largest_free_bytes: int
    pinned_objects: int
    lookups: int
    hits: int
    puts: int
    bytes_written: int
    bytes_read: int
    evictions: int
    rejected_full: int
    corrupt_dropped: int
    not_admitted: Mapping[str, int] = field(default_factory=dict)
    waiting: int = 0
    pauses: int = 0
    paused: int = 0


class Gate(Protocol):
    """Decides what may be written into a tier below the first one."""

    refused: dict[str, int]

    def see(self, keys: Iterable[TierKey]) -> None:
        """Take in that tier blocks were asked for."""

    def is_frequent(self, key: TierKey) -> bool:
        """Tell whether a tier block is asked for often enough to be written."""

    def admits(self, key: TierKey, nbytes: int) -> bool:
        """Decide about an object that is about to be written."""


class Tier(ABC):
    """A place where tier blocks live.

    Guarantees: an object is visible only when it is whole; concurrent writers of one key write once;
    a pinned object is not evicted; no call blocks the event loop; every call that moves bytes ends by
    its deadline. One event loop owns a tier; calls from other loops are errors.
    """

    name: str

    @property
    def reads_into_device(self) -> bool:
        """Whether `get` also fills registered memory of a device, without looking at the bytes itself."""
        return False

    @abstractmethod
    async def contains_prefix(self, keys: Sequence[TierKey]) -> int:
        """Return how many leading `keys` are stored whole. Touches them for eviction order."""

    @abstractmethod
    def size_of(self, key: TierKey) -> int | None:
        """Return the stored size of an object in bytes, or None if it is not stored whole."""

    @abstractmethod
    async def put(self, key: TierKey, source: MemorySpan, *, timeout_s: float) -> bool:
        """Store an object; evicts least recently used, unpinned objects to make room.

        Returns
        -------
        bool
            False if the key is already stored or being written by another caller (write once).

        Raises
        ------
        TierFullError
            If room cannot be made (also when the disk itself is full); nothing is stored.
        TransferError
            If the bytes could not be moved; nothing is visible.
        """

    @abstractmethod
    async def get(self, reads: Sequence[ReadRequest], *, timeout_s: float) -> None:
        """Move byte ranges of stored objects into registered memory, in one batch.

        Objects read are protected from eviction until the call returns.

        Raises
        ------
        ObjectMissingError
            If a key is not stored.
        ObjectCorruptError
            If an object turns out shorter than the range asked for.
        TransferError
            If bytes could not be moved; the destination's contents are undefined.
        """

    @abstractmethod
    def pin(self, keys: Iterable[TierKey]) -> list[TierKey]:
        """Protect stored objects from eviction (counted; pin twice, unpin twice). Returns those pinned."""

    @abstractmethod
    def unpin(self, keys: Iterable[TierKey]) -> None:
        """Undo `pin`."""

    def prefer(self, keys: Iterable[TierKey], times: int) -> None:  # noqa: B027  # optional
        """Let eviction pass over stored objects so many times before they go; others of them are ignored.

        Counted anew by every call. A tier that does not evict by itself, as by default, ignores all.
        """

    @abstractmethod
    async def evict(self, keys: Iterable[TierKey]) -> int:
        """Drop objects (pinned or being read ones stay); returns how many went."""

    @abstractmethod
    async def clear(self) -> None:
        """Drop every object that is not pinned or being read."""

    def watch(self, on_change: OnChange) -> None:  # noqa: B027  # optional
        """Call `on_change` on the tier's event loop for every object that comes or goes from now on.

        It must be quick and must not call the tier. A tier that cannot tell, as by default, tells nothing.
        """

    @abstractmethod
    def stats(self) -> TierStats:
        """Return the counters."""

    @abstractmethod
    async def close(self) -> None:
        """Finish or abandon what is in flight and release everything. Idempotent."""
