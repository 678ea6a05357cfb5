"""A tier that is passed over while it keeps timing out, so that no request pays for it.

Only deadlines count: a failure that is told at once costs a request little. Reading and writing are judged
apart, for a full or read-only disk may be read as well as ever.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import replace

from dynamo_kvtc.deadline import in_time
from dynamo_kvtc.errors import KvtcError, StoreUnavailableError, TransferError, TransferTimeoutError
from dynamo_kvtc.tiers.base import ReadRequest, Tier, TierKey, TierStats
from dynamo_kvtc.tiers.breaker import CircuitBreaker
from dynamo_kvtc.tiers.wrapper import TierWrapper
from dynamo_kvtc.transfer import MemorySpan, StagingPool

__all__ = ["BreakerTier"]

_log = logging.getLogger(__name__)


class BreakerTier(TierWrapper):
    """Puts a circuit breaker around a tier's lookups and reads, and one around its writes.

    After three timeouts the tier holds nothing: lookups find nothing in it and reads fail at once. After a
    pause it is tried in the background with the next keys that are asked for: a lookup, and one object read
    whole. No request waits for the trial. If it ends in time the tier serves again, and one more timeout
    opens the breaker for twice as long, until something as large as what was late arrives in time.

    Parameters
    ----------
    staging : StagingPool
        Memory that an object is read into on trial.
    patience_s : float
        How long a lookup may take. Reads and writes that were given less time than this do not count.
    trial_s : float
        Deadline of a trial.
    """

    def __init__(
        self,
        inner: Tier,
        staging: StagingPool,
        *,
        patience_s: float = 1.0,
        trial_s: float = 10.0,
        reading: CircuitBreaker | None = None,
        writing: CircuitBreaker | None = None,
    ) -> None:
        super().__init__(inner)
        self._staging, self._patience_s, self._trial_s = staging, patience_s, trial_s
        self.reading, self.writing = reading or CircuitBreaker(), writing or CircuitBreaker()
        #: Size of the largest read that was late since the breaker last closed. Smaller ones prove nothing.
        self._late_bytes = 0
        self._trial: asyncio.Task[None] | None = None

    async def contains_prefix(self, keys: Sequence[TierKey]) -> int:
        """As `Tier.contains_prefix`; 0 if the tier takes too long, or keeps timing out."""
        if self.reading.state != "closed":
            self._try(keys)
            return 0
        try:
            found = await in_time(self.inner.contains_prefix(keys), self._patience_s)
        except (TimeoutError, asyncio.TimeoutError):  # two classes before Python 3.11
            self._late("a lookup", 0, self._patience_s)
            return 0
        self._answered(0)
        return found

    def size_of(self, key: TierKey) -> int | None:
        """As `Tier.size_of`; None while the tier is passed over."""
        return self.inner.size_of(key) if self.reading.state == "closed" else None

    async def get(self, reads: Sequence[ReadRequest], *, timeout_s: float) -> None:
        """As `Tier.get`.

        Raises
        ------
        StoreUnavailableError
            At once, while the tier is passed over.
        """
        if self.reading.state != "closed":
            raise self._unavailable(self.reading)
        nbytes = sum(read.into.nbytes for read in reads)
        started = time.monotonic()
        try:
            await self.inner.get(reads, timeout_s=timeout_s)
        except TransferTimeoutError:
            self._late("a read", nbytes, timeout_s)
            raise
        except asyncio.CancelledError:
            # By whoever's deadline ended no later than the tier's own.
            if time.monotonic() - started >= timeout_s:
                self._late("a read", nbytes, timeout_s)
            raise
        self._answered(nbytes)

    async def put(self, key: TierKey, source: MemorySpan, *, timeout_s: float) -> bool:
        """As `Tier.put`.

        Raises
        ------
        StoreUnavailableError
            At once, while the tier is left alone; one write at a time is let through to try it.
        """
        if not self.writing.allow():
            raise self._unavailable(self.writing)
        try:
            written = await self.inner.put(key, source, timeout_s=timeout_s)
        except TransferTimeoutError:
            if timeout_s >= self._patience_s:
                self.writing.failed()
            else:
                self.writing.undecided()
            raise
        except TransferError:
            self.writing.undecided()
            raise
        except KvtcError:  # such as a full tier: an answer
            self.writing.succeeded()
            raise
        except BaseException:
            self.writing.undecided()
            raise
        self.writing.succeeded()
        return written

    def stats(self) -> TierStats:
        """As `Tier.stats`, with what the breakers did."""
        pauses = self.reading.openings + self.writing.openings
        return replace(self.inner.stats(), pauses=pauses, paused=int(self.reading.state != "closed"))

    async def close(self) -> None:
        """As `Tier.close`."""
        if self._trial is not None:
            self._trial.cancel()
            await asyncio.wait({self._trial})
        await super().close()

    # --- judging -----------------------------------------------------------------------------------

    def _late(self, what: str, nbytes: int, given_s: float) -> None:
        if given_s < self._patience_s:
            return
        self._late_bytes = max(self._late_bytes, nbytes)
        openings = self.reading.openings
        self.reading.failed()
        if self.reading.openings > openings:
            _log.warning(
                "the %s tier is passed over for %.0f s: %s was not done within %g s, again",
                *(self.name, self.reading.retry_in_s, what, given_s),
            )

    def _answered(self, nbytes: int) -> None:
        if self.reading.state == "closed" and nbytes >= self._late_bytes:
            self._late_bytes = 0
            self.reading.succeeded()

    def _unavailable(self, breaker: CircuitBreaker) -> StoreUnavailableError:
        return StoreUnavailableError(
            f"the {self.name} tier kept timing out; next try in {breaker.retry_in_s:.0f} s"
        )

    # --- trying again ------------------------------------------------------------------------------

    def _try(self, keys: Sequence[TierKey]) -> None:
        """Begin a trial if it is time for one."""
        if self.reading.allow():
            self._trial = asyncio.get_running_loop().create_task(self._attempt(list(keys)), name="kvtc-trial")

    async def _attempt(self, keys: list[TierKey]) -> None:
        try:
            answered = await in_time(self._answers(keys), self._trial_s)
        except (TransferTimeoutError, TimeoutError, asyncio.TimeoutError):
            self.reading.failed()
        except KvtcError:
            self.reading.undecided()
        except Exception:
            self.reading.undecided()
            _log.exception("the trial of the %s tier failed unexpectedly", self.name)
        except BaseException:
            self.reading.undecided()
            raise
        else:
            if answered:
                self.reading.on_trial()
                _log.info("the %s tier answers again", self.name)
            else:
                self.reading.undecided()

    async def _answers(self, keys: list[TierKey]) -> bool:
        """Ask for the keys and read one of their objects; returns whether that says anything."""
        await self.inner.contains_prefix(keys)
        sizes = ((key, self.inner.size_of(key)) for key in keys)
        fitting = ((key, size) for key, size in sizes if size is not None and size <= self._staging.nbytes)
        key, size = next(fitting, (b"", 0))
        if not size:
            return not self._late_bytes
        async with self._staging.lease(size, timeout_s=self._trial_s) as span:
            await self.inner.get([ReadRequest(key, 0, span)], timeout_s=self._trial_s)
        return True
