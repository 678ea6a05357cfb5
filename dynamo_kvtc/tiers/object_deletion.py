"""Deleting objects from a bucket in the background: in batches, bounded, before a key is written again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from dynamo_kvtc.errors import KvtcError
from dynamo_kvtc.tiers.base import TierKey

__all__ = ["Deletions"]

_log = logging.getLogger(__name__)

# What one DeleteObjects request takes.
_BATCH = 1000
_ATTEMPTS = 3
_PAUSE_S = 1.0


class Deletions:
    """Keys that are to be deleted, and the task that does it. Lives on one event loop.

    Parameters
    ----------
    delete : Callable
        Deletes keys; raises `KvtcError` if it could not.
    most_waiting : int
        Keys that may wait; further ones stay in the bucket, where its lifecycle or the next start of a
        single owner finds them.

    Attributes
    ----------
    given_up : int
        Keys that could not be deleted.
    """

    def __init__(
        self, delete: Callable[[Sequence[TierKey]], Awaitable[None]], *, most_waiting: int = 100_000
    ) -> None:
        self._delete = delete
        self._most_waiting = most_waiting
        self._waiting: dict[TierKey, asyncio.Future[None]] = {}
        self._task: asyncio.Task[None] | None = None
        self.given_up = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, key: TierKey) -> None:
        """Have a key deleted soon; does not block."""
        if key in self._waiting:
            return
        if len(self._waiting) >= self._most_waiting:
            self.given_up += 1
            return
        loop = asyncio.get_running_loop()
        self._waiting[key] = loop.create_future()
        if self._task is None or self._task.done():
            self._task = loop.create_task(self._run(), name="kvtc-delete")

    async def settled(self, key: TierKey, timeout_s: float) -> bool:
        """Wait until a key is not to be deleted any more; returns whether that is so."""
        waiting = self._waiting.get(key)
        if waiting is not None:
            await asyncio.wait({waiting}, timeout=timeout_s)
        return key not in self._waiting

    async def _run(self) -> None:
        while self._waiting:
            keys = list(self._waiting)[:_BATCH]
            for attempt in range(_ATTEMPTS):
                try:
                    await self._delete(keys)
                    break
                except KvtcError as error:
                    if attempt == _ATTEMPTS - 1:
                        self.given_up += len(keys)
                        _log.warning("%d objects could not be deleted: %s", len(keys), error)
                    else:
                        await asyncio.sleep(_PAUSE_S * (attempt + 1))
            for key in keys:
                self._waiting.pop(key).set_result(None)

    async def close(self, timeout_s: float) -> None:
        """Finish what waits, for `timeout_s` at most. Idempotent."""
        if self._task is not None and not self._task.done():
            await asyncio.wait({self._task}, timeout=timeout_s)
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
