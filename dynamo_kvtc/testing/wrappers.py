"""Tiers around a tier: slower, or failing on purpose."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Mapping, Sequence

from dynamo_kvtc.errors import TransferTimeoutError
from dynamo_kvtc.tiers.base import ReadRequest, Tier, TierKey
from dynamo_kvtc.tiers.wrapper import TierWrapper
from dynamo_kvtc.transfer import MemorySpan

__all__ = ["FaultyTier", "ThrottledTier", "TierWrapper"]


class ThrottledTier(TierWrapper):
    """A tier behind a link of limited bandwidth that everything passes, first come first served.

    Parameters
    ----------
    bytes_per_s : float
        Bandwidth of the link, for reads and writes together.
    latency_s : float
        Added to each call.

    Raises
    ------
    ValueError
        If the bandwidth is not positive, or the latency negative.
    """

    def __init__(self, inner: Tier, bytes_per_s: float, *, latency_s: float = 0.0) -> None:
        super().__init__(inner)
        if bytes_per_s <= 0 or latency_s < 0:
            raise ValueError(
                f"bandwidth must be positive and latency not negative: {bytes_per_s}, {latency_s}"
            )
        self._bytes_per_s = bytes_per_s
        self._latency_s = latency_s
        self._link_free_at = 0.0

    async def put(self, key: TierKey, source: MemorySpan, *, timeout_s: float) -> bool:
        """Put, and take at least the time that the link needs."""
        left = await self._pass(source.nbytes, timeout_s)
        return await self.inner.put(key, source, timeout_s=left)

    async def get(self, reads: Sequence[ReadRequest], *, timeout_s: float) -> None:
        """Get, and take at least the time that the link needs."""
        left = await self._pass(sum(read.into.nbytes for read in reads), timeout_s)
        await self.inner.get(reads, timeout_s=left)

    async def _pass(self, nbytes: int, timeout_s: float) -> float:
        """Wait for the bytes' turn and passage; return what is left of the deadline."""
        now = time.monotonic()
        self._link_free_at = max(now, self._link_free_at) + nbytes / self._bytes_per_s
        arrival = self._link_free_at + self._latency_s
        if arrival - now > timeout_s:
            await asyncio.sleep(timeout_s)
            raise TransferTimeoutError(
                f"{nbytes} bytes did not pass the throttled link within {timeout_s:g} s"
            )
        await asyncio.sleep(arrival - now)
        return timeout_s - (arrival - now)


class FaultyTier(TierWrapper):
    """A tier whose gets misbehave, chosen by their number (0 is the first `get` after making this).

    Parameters
    ----------
    failing : Mapping[int, Exception]
        Gets that raise instead of moving anything.
    short : Collection[int]
        Gets that report success although the second half of each destination was not written, as some
        storage reports short reads as done; those bytes are set to zero.
    rotten : Collection[int]
        Gets that report success although one bit of each destination is wrong.
    stuck : Collection[int]
        Gets that do nothing until their deadline, or until they are cancelled.
    failing_puts : Mapping[int, Exception]
        Puts that raise, by their number.
    delay_s : float
        Waited before each get.

    Attributes
    ----------
    gets, puts : int
        Calls so far.
    """

    def __init__(
        self,
        inner: Tier,
        *,
        failing: Mapping[int, Exception] | None = None,
        short: Collection[int] = (),
        rotten: Collection[int] = (),
        stuck: Collection[int] = (),
        failing_puts: Mapping[int, Exception] | None = None,
        delay_s: float = 0.0,
    ) -> None:
        super().__init__(inner)
        self.gets = 0
        self.puts = 0
        self._failing = dict(failing or {})
        self._failing_puts = dict(failing_puts or {})
        self._short = frozenset(short)
        self._rotten = frozenset(rotten)
        self._stuck = frozenset(stuck)
        self._delay_s = delay_s

    async def put(self, key: TierKey, source: MemorySpan, *, timeout_s: float) -> bool:
        """Put, or raise what was ordered for this put."""
        number, self.puts = self.puts, self.puts + 1
        if number in self._failing_puts:
            raise self._failing_puts[number]
        return await self.inner.put(key, source, timeout_s=timeout_s)

    async def get(self, reads: Sequence[ReadRequest], *, timeout_s: float) -> None:
        """Get, or misbehave as was ordered for this get."""
        number, self.gets = self.gets, self.gets + 1
        if self._delay_s:
            await asyncio.sleep(self._delay_s)
        if number in self._failing:
            raise self._failing[number]
        if number in self._stuck:
            await asyncio.sleep(timeout_s)
            raise TransferTimeoutError(f"the get was stuck for all of its {timeout_s:g} s")
        await self.inner.get(reads, timeout_s=timeout_s)
        if number in self._short:
            for read in reads:
                written = read.into.nbytes // 2
                read.into.view[written:] = bytes(read.into.nbytes - written)
        if number in self._rotten:
            for read in reads:
                read.into.view[read.into.nbytes // 2] ^= 0x10
