"""Tiers from fast to slow, used as one.

Puts go through to every tier, to slow ones behind the caller's back. Reads come from the fastest tier that
has the object and fall to the next one if it turns out missing, damaged or unreadable there. Objects in a
slower tier can be promoted: copied into the first tier in the background, within a bound.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from dynamo_kvtc.errors import (
    KvtcError,
    ObjectCorruptError,
    ObjectMissingError,
    TierError,
    TransferError,
    TransferTimeoutError,
)
from dynamo_kvtc.tiers.base import Gate, ReadRequest, Tier, TierKey, TierStats
from dynamo_kvtc.tiers.read_clock import ReadClock
from dynamo_kvtc.tiers.write_behind import WriteBehind
from dynamo_kvtc.transfer import MemorySpan, StagingPool

__all__ = ["TierStack"]

_log = logging.getLogger(__name__)


# A lookup of more keys than this lets others use the event loop in between.
_KEYS_PER_TURN = 512


async def _let_others(keys: Sequence[TierKey]) -> None:
    if len(keys) > _KEYS_PER_TURN:
        await asyncio.sleep(0)


class TierStack:
    """A stack of tiers. Owns them: `close` closes them.

    Parameters
    ----------
    tiers : Sequence[Tier]
        From fast to slow; at least one, with different names.
    staging : StagingPool, optional
        Memory that promotion goes through; without it nothing is promoted.
    gates : Mapping[str, Gate], optional
        By a tier's name, what decides about writing into it. The first tier takes everything.
    behind : Mapping[str, WriteBehind]
        By a tier's name, what writes into it in the background. An object that no faster tier has is written
        before `put` returns all the same. Owned: `close` closes them.
    max_promotions : int
        Objects that may wait to be promoted; further ones are served but not promoted.
    promotion_timeout_s : float
        Deadline of each step of a promotion.

    Attributes
    ----------
    promotions : int
        Objects promoted.

    Raises
    ------
    ValueError
        If there is no tier, or two have one name.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        *,
        staging: StagingPool | None = None,
        gates: Mapping[str, Gate] | None = None,
        behind: Mapping[str, WriteBehind] | None = None,
        max_promotions: int = 1024,
        promotion_timeout_s: float = 10.0,
    ) -> None:
        if not tiers or len({tier.name for tier in tiers}) < len(tiers):
            raise ValueError("a stack needs at least one tier, and a different name for each")
        self.tiers = tuple(tiers)
        self.promotions = 0
        self._failed_puts = 0
        self._behind = dict(behind or {})
        self._staging = staging
        self._gates = {name: gate for name, gate in (gates or {}).items() if name != self.tiers[0].name}
        self._max_promotions = max_promotions
        self._promotion_timeout_s = promotion_timeout_s
        #: Called with a tier's name, bytes, and the seconds in which at least one read of it was under way.
        self.on_read: Callable[[str, int, float], None] = lambda tier, nbytes, seconds: None
        self._clocks = {tier.name: ReadClock() for tier in self.tiers}
        # What is to be promoted, from where to where, and the task that does it, one object at a time.
        self._promoting: dict[TierKey, tuple[Tier, Tier]] = {}
        self._promoter: asyncio.Task[None] | None = None
        # Which tiers each pin of a key holds it in: a tier that gets the object later is not pinned.
        self._pins: defaultdict[TierKey, list[tuple[Tier, ...]]] = defaultdict(list)

    # --- looking up --------------------------------------------------------------------------------

    async def lookup_prefix(self, keys: Sequence[TierKey]) -> list[Tier]:
        """Return the fastest tier of each of the leading `keys` that any tier stores whole; touches them."""
        # Every tier is asked about all keys: what is in use stays young in each of them.
        for tier in self.tiers:
            await tier.contains_prefix(keys)
            await _let_others(keys)
        for gate in self._gates.values():
            gate.see(keys)
        found: list[Tier] = []
        for first in range(0, len(keys), _KEYS_PER_TURN):
            for key in keys[first : first + _KEYS_PER_TURN]:
                index = self._fastest(key, 0)
                if index is None:
                    return found
                found.append(self.tiers[index])
            await _let_others(keys)
        return found

    async def contains_prefix(self, keys: Sequence[TierKey]) -> int:
        """Return how many leading `keys` are stored whole in one tier or another; touches them."""
        return len(await self.lookup_prefix(keys))

    def size_of(self, key: TierKey) -> int | None:
        """Return the stored size of an object in bytes, or None if no tier has it whole."""
        index = self._fastest(key, 0)
        return None if index is None else self.tiers[index].size_of(key)

    def _fastest(self, key: TierKey, first: int) -> int | None:
        for index in range(first, len(self.tiers)):
            if self.tiers[index].size_of(key) is not None:
                return index
        return None

    # --- moving bytes ------------------------------------------------------------------------------

    async def put(
        self, key: TierKey, source: MemorySpan, *, timeout_s: float, depth: int | None = None
    ) -> bool:
        """Store an object in every tier, or in the leading `depth` of them, the fastest first.

        A tier that fails does not keep the object from the others; that is counted in `failed_puts`. A tier
        that is written to behind has the object later, or never: ask it (`Tier.size_of`), or see `flush`.

        Returns
        -------
        bool
            Whether any tier newly stored it by now.

        Raises
        ------
        TierError, TransferError
            The first failure, if no tier has the object afterwards.
        """
        deadline = time.monotonic() + timeout_s
        written = False
        failures: list[KvtcError] = []
        asked = 0
        for index, tier in enumerate(self.tiers[:depth]):
            gate = self._gates.get(tier.name)
            if gate is not None and tier.size_of(key) is None and not gate.admits(key, source.nbytes):
                continue
            behind = self._behind.get(tier.name)
            if behind is not None and any(faster.size_of(key) is not None for faster in self.tiers[:index]):
                await behind.take(key, source)
                continue
            asked += 1
            try:
                left = max(0.0, deadline - time.monotonic())
                written |= await tier.put(key, source, timeout_s=left)
            except (TierError, TransferError) as error:
                _log.debug("put into the %s tier failed: %s", tier.name, error)
                failures.append(error)
        if len(failures) == asked:
            raise failures[0]
        self._failed_puts += len(failures)
        return written

    @property
    def failed_puts(self) -> int:
        """Puts that a tier refused or failed while another tier took the object."""
        return self._failed_puts + sum(behind.dropped["failed"] for behind in self._behind.values())

    async def flush(self, timeout_s: float) -> None:
        """Wait until what is written behind so far is stored or dropped.

        Raises
        ------
        TransferTimeoutError
            If it is not within `timeout_s` seconds; it goes on.
        """
        deadline = time.monotonic() + timeout_s
        for behind in self._behind.values():
            await behind.flush(max(0.0, deadline - time.monotonic()))

    async def get(self, reads: Sequence[ReadRequest], *, timeout_s: float) -> None:
        """Read each range from the fastest tier that has its object, and so on down; see `Tier.get`.

        A read that timed out is not tried elsewhere: its transfer may still write to the destination.

        Raises
        ------
        ObjectMissingError
            If no tier has an object, or only damaged ones.
        TransferError
            If bytes could not be moved from any tier that has the object.
        """
        deadline = time.monotonic() + timeout_s
        first_tier: dict[TierKey, int] = {}
        pending = list(reads)
        while pending:
            groups = self._by_tier(pending, first_tier)
            left = max(0.0, deadline - time.monotonic())
            results = await asyncio.gather(
                *(self._read(self.tiers[index], group, left) for index, group in groups.items()),
                return_exceptions=True,
            )
            pending = []
            for (index, group), result in zip(groups.items(), results, strict=True):
                if result is not None:
                    self._fall_through(index, group, result, first_tier)
                    pending += group

    async def _read(self, tier: Tier, reads: list[ReadRequest], timeout_s: float) -> None:
        if not tier.reads_into_device and any(read.into.region.on_device for read in reads):
            raise TransferError(f"the {tier.name} tier does not read into a device's memory")
        clock = self._clocks[tier.name]
        clock.start()
        nbytes = 0
        try:
            await tier.get(reads, timeout_s=timeout_s)
            nbytes = sum(read.into.nbytes for read in reads)
        finally:
            measured = clock.stop(nbytes)
            if measured is not None:
                self.on_read(tier.name, *measured)

    def _by_tier(
        self, reads: Sequence[ReadRequest], first_tier: dict[TierKey, int]
    ) -> dict[int, list[ReadRequest]]:
        groups: dict[int, list[ReadRequest]] = {}
        for read in reads:
            index = self._fastest(read.key, first_tier.get(read.key, 0))
            if index is None:
                raise ObjectMissingError(f"no tier has a sound object {read.key.hex()}")
            groups.setdefault(index, []).append(read)
        return groups

    def _fall_through(
        self, index: int, group: list[ReadRequest], error: BaseException, first_tier: dict[TierKey, int]
    ) -> None:
        """Let the next round pass over this tier for what it failed to serve; raise what is final."""
        if isinstance(error, TransferTimeoutError):
            raise error
        if isinstance(error, (ObjectMissingError, ObjectCorruptError)):
            # One bad object fails its whole batch; the tier has dropped it and serves the others again.
            failed = {read.key for read in group if self.tiers[index].size_of(read.key) is None}
        elif isinstance(error, TransferError):
            failed = set()
        else:
            raise error
        failed = failed or {read.key for read in group}
        for key in failed:
            first_tier[key] = index + 1
        if any(self._fastest(key, index + 1) is None for key in failed):
            raise error

    # --- promotion ---------------------------------------------------------------------------------

    def promote(self, keys: Iterable[TierKey]) -> None:
        """Begin to copy objects that only slower tiers have into the first one, in the background.

        For callers that have read them and expect to read them again. Not done by `get` itself: whoever
        waits for a slow tier needs all of its bandwidth. One object moves at a time; those beyond
        `max_promotions` stay where they are.
        """
        if self._staging is None:
            return
        for key in keys:
            if len(self._promoting) >= self._max_promotions:
                break
            index = self._fastest(key, 0)
            if index is None or key in self._promoting:
                continue
            target = self.tiers[0] if index else self._kept_out(key)
            if target is not None:
                self._promoting[key] = self.tiers[index], target
        if self._promoting and (self._promoter is None or self._promoter.done()):
            self._promoter = asyncio.get_running_loop().create_task(self._promote(), name="kvtc-promote")

    async def _promote(self) -> None:
        while self._promoting:
            key, (tier, target) = next(iter(self._promoting.items()))
            try:
                await self._copy(tier, target, key)
            except Exception:
                _log.exception("promotion of an object from the %s tier failed unexpectedly", tier.name)
            finally:
                self._promoting.pop(key, None)

    def _kept_out(self, key: TierKey) -> Tier | None:
        """Return a tier whose gate kept an object out that is asked for often enough by now."""
        for tier in self.tiers:
            gate = self._gates.get(tier.name)
            if gate is not None and tier.size_of(key) is None and gate.is_frequent(key):
                return tier
        return None

    async def _copy(self, tier: Tier, target: Tier, key: TierKey) -> None:
        size = tier.size_of(key)
        if size is None or self._staging is None or size > self._staging.nbytes:
            return
        gate = self._gates.get(target.name)
        if gate is not None and not gate.admits(key, size):
            return
        limit = self._promotion_timeout_s
        try:
            async with self._staging.lease(size, timeout_s=limit) as span:
                await tier.get([ReadRequest(key, 0, span)], timeout_s=limit)
                copied = await target.put(key, span, timeout_s=limit)
                self.promotions += copied and target is self.tiers[0]
        except (TierError, TransferError) as error:
            _log.debug("promotion of an object from the %s tier failed: %s", tier.name, error)

    async def settle(self) -> None:
        """Wait until the promotions under way have ended."""
        if self._promoter is not None and not self._promoter.done():
            await asyncio.wait({self._promoter})

    # --- the rest ----------------------------------------------------------------------------------

    def pin(self, keys: Iterable[TierKey]) -> list[TierKey]:
        """Protect objects from eviction in every tier that has them now; returns those pinned."""
        pinned = []
        for key in keys:
            holders = tuple(tier for tier in self.tiers if tier.pin([key]))
            if holders:
                self._pins[key].append(holders)
                pinned.append(key)
        return pinned

    def unpin(self, keys: Iterable[TierKey]) -> None:
        """Undo `pin`."""
        for key in keys:
            pins = self._pins.get(key)
            if not pins:
                continue
            for tier in pins.pop():
                tier.unpin([key])
            if not pins:
                del self._pins[key]

    def prefer(self, keys: Sequence[TierKey], times: int) -> None:
        """Let eviction pass over objects so many times, in every tier that has them; see `Tier.prefer`."""
        for tier in self.tiers:
            tier.prefer(keys, times)

    async def evict(self, keys: Sequence[TierKey]) -> int:
        """Drop objects from every tier (pinned or being read ones stay); returns how many copies went.

        What is still to be written behind is not written.
        """
        for behind in self._behind.values():
            await behind.forget(set(keys))
        return sum([await tier.evict(keys) for tier in self.tiers])

    async def clear(self) -> None:
        """Drop every object that is not pinned or being read from every tier; write nothing behind."""
        for behind in self._behind.values():
            await behind.forget()
        for tier in self.tiers:
            await tier.clear()

    def stats(self) -> dict[str, TierStats]:
        """Return each tier's counters by its name, from fast to slow."""
        stats = {tier.name: tier.stats() for tier in self.tiers}
        for name, gate in self._gates.items():
            stats[name] = replace(stats[name], not_admitted=dict(gate.refused))
        for name, behind in self._behind.items():
            dropped = {str(why): count for why, count in behind.dropped.items() if why != "failed"}
            stats[name] = replace(
                stats[name], not_admitted={**stats[name].not_admitted, **dropped}, waiting=behind.waiting
            )
        return stats

    async def close(self) -> None:
        """Cancel promotions, write behind for some seconds more, and close every tier. Idempotent."""
        self._max_promotions = 0
        self._promoting.clear()
        if self._promoter is not None and not self._promoter.done():
            self._promoter.cancel()
            await asyncio.wait({self._promoter}, timeout=self._promotion_timeout_s)
        for behind in self._behind.values():
            await behind.close()
        for tier in self.tiers:
            await tier.close()
