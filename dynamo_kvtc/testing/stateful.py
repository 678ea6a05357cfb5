"""Random sequences of calls on a tier, compared with a model (a dict in order of use)."""

from __future__ import annotations

import asyncio
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from dynamo_kvtc.errors import ObjectMissingError, TierFullError
from dynamo_kvtc.testing.conformance import TierDriver, object_bytes, object_key
from dynamo_kvtc.tiers.base import Tier
from dynamo_kvtc.transfer import StagingPool, TransferAgent

__all__ = ["OpenTier", "check_tier_against_model"]

T = TypeVar("T")

#: Opens the tier under test: agent, folder, capacity in bytes.
OpenTier = Callable[[TransferAgent, Path, int], Awaitable[Tier]]

_CAPACITY = 256 << 10
_NUMBERS = st.integers(0, 11)
_SIZES = st.one_of(st.integers(1, 70_000), st.sampled_from([1, 64, 4096, 8192, 65_536]))


def check_tier_against_model(
    open_tier: OpenTier,
    *,
    persistent: bool,
    keeps_order: bool = True,
    stored_size: Callable[[int], int] = int,
    profile: settings | None = None,
) -> None:
    """Drive a tier with random calls: put, get, prefixes, pin, unpin, evict, clear, reopen.

    Checked throughout: bytes come back as they were put; only unpinned objects vanish, when something is
    put, and the least recently used ones first; the books balance; reopening a persistent tier keeps
    every object.

    Parameters
    ----------
    persistent : bool
        Whether objects outlive `Tier.close`.
    keeps_order : bool
        Whether a persistent tier's objects come back in the order in which they were put.
    stored_size : Callable[[int], int]
        What ``TierStats.stored_bytes`` counts for an object of so many bytes.
    profile : hypothesis.settings, optional
        How long to search.
    """
    loop = asyncio.new_event_loop()
    try:
        agent = loop.run_until_complete(TransferAgent.create())
        staging = loop.run_until_complete(StagingPool.create(agent, 1 << 20))
        run_state_machine_as_test(
            # Hypothesis takes any factory; its annotation names classes only.
            lambda: _TierMachine(  # type: ignore[arg-type]
                loop, agent, staging, open_tier, persistent, keeps_order, stored_size
            ),
            settings=profile
            or settings(
                max_examples=25,
                stateful_step_count=30,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
        loop.run_until_complete(staging.close())
        loop.run_until_complete(agent.close())
    finally:
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()


class _TierMachine(RuleBasedStateMachine):
    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        agent: TransferAgent,
        staging: StagingPool,
        open_tier: OpenTier,
        persistent: bool,
        keeps_order: bool,
        stored_size: Callable[[int], int],
    ) -> None:
        super().__init__()
        self._keeps_order, self._stored_size = keeps_order, stored_size
        self._loop, self._agent, self._staging = loop, agent, staging
        self._open_tier, self._persistent = open_tier, persistent
        self._folder = tempfile.TemporaryDirectory()
        #: Sizes by number, least recently used first.
        self._model: dict[int, int] = {}
        self._written: list[int] = []
        self._pins: Counter[int] = Counter()
        self._open()

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self._loop.run_until_complete(coroutine)

    def _open(self) -> None:
        async def opened() -> Tier:
            return await self._open_tier(self._agent, Path(self._folder.name), _CAPACITY)

        self._driver = TierDriver(self._run(opened()), self._staging)

    @property
    def _tier(self) -> Tier:
        return self._driver.tier

    def _touch(self, number: int) -> None:
        self._model[number] = self._model.pop(number)

    @rule(number=_NUMBERS, nbytes=_SIZES)
    def put(self, number: int, nbytes: int) -> None:
        before = dict(self._model)
        try:
            written = self._run(self._driver.put(number, nbytes))
        except TierFullError:
            assert number not in before
            assert self._pins, "nothing is pinned, so there is room"
            self._expect_evicted(before)
            return
        assert written == (number not in before)
        self._expect_evicted(before)
        if written:
            self._model[number] = nbytes
            self._written.append(number)

    def _expect_evicted(self, before: dict[int, int]) -> None:
        """Take note of what went to make room: unpinned, and older than all unpinned that stayed."""
        gone = [other for other in before if self._tier.size_of(object_key(other)) is None]
        assert not any(self._pins[other] for other in gone)
        candidates = [other for other in before if not self._pins[other]]
        assert gone == candidates[: len(gone)]
        for other in gone:
            del self._model[other]

    @rule(number=_NUMBERS, where=st.tuples(st.floats(0, 1), st.floats(0, 1)))
    def get(self, number: int, where: tuple[float, float]) -> None:
        if number not in self._model:
            try:
                self._run(self._driver.get(number, 0, 1))
            except ObjectMissingError:
                return
            raise AssertionError("an object that is not there was read")
        size = self._model[number]
        start, stop = sorted(round(share * size) for share in where)
        start, stop = min(start, size - 1), max(stop, start + 1, 1)
        stop = min(stop, size)
        assert (
            self._run(self._driver.get(number, start, stop - start)) == object_bytes(number, size)[start:stop]
        )
        self._touch(number)

    @rule(numbers=st.lists(_NUMBERS, max_size=6, unique=True))
    def prefix(self, numbers: list[int]) -> None:
        expected = next((i for i, number in enumerate(numbers) if number not in self._model), len(numbers))
        assert self._run(self._driver.prefix(*numbers)) == expected
        for number in reversed(numbers[:expected]):
            self._touch(number)

    @rule(number=_NUMBERS)
    def pin(self, number: int) -> None:
        pinned = self._tier.pin([object_key(number)])
        assert pinned == ([object_key(number)] if number in self._model else [])
        self._pins[number] += len(pinned)
        self._pins = +self._pins

    @precondition(lambda self: self._pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self._pins)))
        self._tier.unpin([object_key(number)])
        self._pins[number] -= 1
        self._pins = +self._pins

    @rule(numbers=st.lists(_NUMBERS, max_size=4))
    def evict(self, numbers: list[int]) -> None:
        gone = {number for number in numbers if number in self._model and not self._pins[number]}
        assert self._run(self._tier.evict([object_key(number) for number in numbers])) == len(gone)
        for number in gone:
            del self._model[number]

    @rule()
    def clear(self) -> None:
        self._run(self._tier.clear())
        self._model = {number: size for number, size in self._model.items() if self._pins[number]}

    @rule()
    def reopen(self) -> None:
        self._run(self._tier.close())
        self._pins.clear()
        last_written = {number: index for index, number in enumerate(self._written)}
        kept = sorted(self._model, key=lambda number: last_written[number]) if self._persistent else []
        self._model = {number: self._model[number] for number in kept}
        self._open()
        if not self._keeps_order:
            for number in kept:
                assert self._run(self._driver.prefix(number)) == 1

    @invariant()
    def books_balance(self) -> None:
        stats = self._tier.stats()
        assert stats.objects == len(self._model)
        assert stats.stored_bytes == sum(map(self._stored_size, self._model.values()))
        assert stats.pinned_objects == len(self._pins)
        assert stats.stored_bytes <= stats.allocated_bytes <= stats.capacity_bytes
        for number, size in self._model.items():
            assert self._tier.size_of(object_key(number)) == size

    def teardown(self) -> None:
        for number, size in self._model.items():
            assert self._run(self._driver.get(number, 0, size)) == object_bytes(number, size)
        self._run(self._tier.close())
        self._folder.cleanup()
