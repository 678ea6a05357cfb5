"""Asking a bucket which keys of a prefix it holds, without making anybody wait for long.

A question costs a round trip, so three things bound it. What was found missing is remembered for a while
and not asked again. Keys are asked in growing steps (1, 4, 16, ...), so that the usual case, a prompt that
nobody has stored, costs one request. And whoever asks waits a short time only: the question goes on behind
its back, and the answer is there for the next lookup.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence

from dynamo_kvtc.errors import KvtcError
from dynamo_kvtc.tiers.base import TierKey

__all__ = ["BucketLookup"]

# Keys asked about at once grow by this factor, up to the most at once.
_GROWTH = 4
_MOST_AT_ONCE = 64


class BucketLookup:
    """Finds out which keys exist in a bucket. Lives on one event loop.

    Parameters
    ----------
    ask : Callable
        Asks for one key's size; None if it is not there. Errors end the question.
    found : Callable
        Told of each key that exists, and its size.
    miss_ttl_s : float
        How long a key that was missing is not asked for again.
    most_misses : int
        Missing keys remembered; the oldest are forgotten first.
    most_questions : int
        Questions that may be under way; beyond it nobody is asked.
    """

    def __init__(
        self,
        ask: Callable[[TierKey], Awaitable[int | None]],
        found: Callable[[TierKey, int], None],
        *,
        miss_ttl_s: float,
        most_misses: int = 65_536,
        most_questions: int = 16,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ask, self._found = ask, found
        self._miss_ttl_s, self._most_misses, self._most_questions = miss_ttl_s, most_misses, most_questions
        self._clock = clock
        self._missing: OrderedDict[TierKey, float] = OrderedDict()
        self._questions: dict[TierKey, asyncio.Task[None]] = {}

    def known_missing(self, key: TierKey) -> bool:
        """Return whether a key was missing when it was asked for, a short while ago."""
        until = self._missing.get(key)
        if until is None:
            return False
        if self._clock() < until:
            return True
        del self._missing[key]
        return False

    def note_missing(self, key: TierKey) -> None:
        """Remember that a key is not there."""
        self._missing.pop(key, None)
        self._missing[key] = self._clock() + self._miss_ttl_s
        while len(self._missing) > self._most_misses:
            self._missing.popitem(last=False)

    def note_stored(self, key: TierKey) -> None:
        """Forget that a key was missing."""
        self._missing.pop(key, None)

    async def extend(self, keys: Sequence[TierKey], wait_s: float) -> None:
        """Ask which leading `keys` exist; return when that is known or `wait_s` has passed.

        The question goes on when the wait is over or the caller is cancelled.
        """
        if not keys or self.known_missing(keys[0]):
            return
        question = self._questions.get(keys[0])
        if question is None:
            if len(self._questions) >= self._most_questions:
                return
            question = asyncio.get_running_loop().create_task(self._run(list(keys)), name="kvtc-lookup")
            self._questions[keys[0]] = question
            question.add_done_callback(lambda _, key=keys[0]: self._questions.pop(key, None))  # type: ignore[misc]
        await asyncio.wait({question}, timeout=wait_s)

    async def _run(self, keys: list[TierKey]) -> None:
        first, count = 0, 1
        while first < len(keys):
            batch = keys[first : first + count]
            answers = await asyncio.gather(*map(self._one, batch))
            if not all(answers):
                return
            first += len(batch)
            count = min(count * _GROWTH, _MOST_AT_ONCE)

    async def _one(self, key: TierKey) -> bool:
        if self.known_missing(key):
            return False
        try:
            size = await self._ask(key)
        except KvtcError:
            return False  # not known, so not there for now; the breaker has taken note
        if size is None:
            self.note_missing(key)
            return False
        self._found(key, size)
        return True

    async def close(self) -> None:
        """End the questions under way. Idempotent."""
        questions = list(self._questions.values())
        for question in questions:
            question.cancel()
        await asyncio.gather(*questions, return_exceptions=True)
