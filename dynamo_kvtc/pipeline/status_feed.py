"""The latest status of an adapter on another thread's loop, for hosts that may not wait for it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from dynamo_kvtc.pipeline.adapter import TierAdapter
from dynamo_kvtc.pipeline.threaded import ThreadedTierAdapter

__all__ = ["StatusFeed"]


class StatusFeed:
    """Asks for the status now and then, and hands out the one that came last. Used by one thread.

    What only the adapter's event loop may read, such as the tiers' fill, is so told a little late; counters
    can be read at any time (`ThreadedTierAdapter.counters`).

    Parameters
    ----------
    every_s : float
        Least seconds between two questions.
    """

    def __init__(self, adapter: ThreadedTierAdapter, *, every_s: float = 1.0) -> None:
        self._adapter, self._every_s = adapter, every_s
        self._latest: Mapping[str, Any] = {}
        self._asked: Future[Mapping[str, Any]] | None = None
        self._ask_at = 0.0

    def latest(self) -> Mapping[str, Any]:
        """Return the status as `AdapterStatus.to_dict` gives it; the same object until there is a newer one.

        Empty before the first answer.
        """
        if self._asked is not None and self._asked.done():
            with suppress(Exception):  # of a loop that is being closed; asked again
                self._latest = self._asked.result()
            self._asked = None
        if self._asked is None and time.monotonic() >= self._ask_at:
            self._ask_at = time.monotonic() + self._every_s
            self._asked = self._adapter.start(_read)
        return self._latest


async def _read(tiers: TierAdapter) -> Mapping[str, Any]:
    return tiers.status().to_dict()
