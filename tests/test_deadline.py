"""Awaiting with a deadline: no cancellation is lost, nothing leaks, whatever comes together."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_kvtc.deadline import in_time


async def steps(count: int) -> None:
    """Let the event loop take so many steps."""
    for _ in range(count):
        await asyncio.sleep(0)


async def test_the_result_and_the_error_pass_through() -> None:
    async def work() -> int:
        await asyncio.sleep(0)
        return 3

    async def fail() -> None:
        raise KeyError("x")

    assert await in_time(work(), 10) == 3
    with pytest.raises(KeyError):
        await in_time(fail(), 10)


async def test_what_is_late_is_over_when_the_caller_is_told() -> None:
    ended = False

    async def work() -> None:
        nonlocal ended
        try:
            await asyncio.sleep(60)
        finally:
            await steps(5)
            ended = True

    with pytest.raises(asyncio.TimeoutError):
        await in_time(work(), 0.001)
    assert ended


async def test_a_result_in_spite_of_the_deadline_is_not_thrown_away() -> None:
    async def work() -> str:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        return "done"

    assert await in_time(work(), 0.001) == "done"


async def test_an_error_on_the_way_out_is_told() -> None:
    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            raise KeyError("x")

    with pytest.raises(KeyError):
        await in_time(work(), 0.001)


@pytest.mark.parametrize("timeout_s", [0, -1])
async def test_a_deadline_that_has_passed(timeout_s: float) -> None:
    with pytest.raises(asyncio.TimeoutError):
        await in_time(asyncio.sleep(60), timeout_s)


async def test_a_cancellation_from_elsewhere_is_no_timeout() -> None:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    waiting = asyncio.create_task(in_time(future, 10))
    await steps(2)
    future.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


@pytest.mark.parametrize("count", range(6))
async def test_a_cancellation_after_the_result(count: int) -> None:
    """In every step between the result and its arrival: not lost, and the result goes back."""
    result: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    given_back: list[str] = []

    async def work() -> str:
        return await result

    caller = asyncio.create_task(in_time(work(), 10, given_back.append))
    await steps(3)
    result.set_result("slot")
    await steps(count)
    over = caller.done()
    caller.cancel()
    (got,) = await asyncio.gather(caller, return_exceptions=True)
    if over:
        assert got == "slot" and not given_back
    else:
        assert isinstance(got, asyncio.CancelledError) and given_back == ["slot"]


@pytest.mark.parametrize("release_first", [True, False])
@pytest.mark.parametrize("count", range(5))
async def test_a_cancellation_that_comes_with_a_slot(count: int, release_first: bool) -> None:
    slots = asyncio.Semaphore(1)
    await slots.acquire()
    caller = asyncio.create_task(in_time(slots.acquire(), 10, lambda _: slots.release()))
    await steps(3)
    acts: list[Callable[[], object]] = [slots.release, caller.cancel]
    first, second = acts if release_first else reversed(acts)
    first()
    await steps(count)
    second()
    (got,) = await asyncio.gather(caller, return_exceptions=True)
    if got is True:  # it was over before it was cancelled
        slots.release()
    else:
        assert isinstance(got, asyncio.CancelledError)
    await asyncio.wait_for(slots.acquire(), 5)


async def test_a_caller_cancelled_again_still_waits_for_the_end() -> None:
    ended = False

    async def work() -> None:
        nonlocal ended
        for _ in range(3):
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(60)
        ended = True

    caller = asyncio.create_task(in_time(work(), 10))
    await steps(2)
    for _ in range(3):
        assert not caller.done()
        caller.cancel()
        await steps(4)
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert ended


async def test_an_error_that_nobody_can_be_told_is_no_warning() -> None:
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            raise KeyError("x")

    caller = asyncio.create_task(in_time(work(), 10))
    await steps(2)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    del caller
    gc.collect()
    await steps(2)
    assert not complaints


@given(
    st.integers(1, 3),
    st.lists(
        st.tuples(st.integers(0, 4), st.none() | st.integers(0, 12), st.booleans()), min_size=1, max_size=12
    ),
)
def test_no_slot_is_lost(most: int, askers: list[tuple[int, int | None, bool]]) -> None:
    """Askers that hold a slot for some steps; some are cancelled after some steps, some cannot wait."""

    async def run() -> None:
        slots = asyncio.Semaphore(most)
        inside = 0

        async def ask(length: int, waits: bool) -> str:
            nonlocal inside
            try:
                await in_time(slots.acquire(), 10 if waits else 0, lambda _: slots.release())
            except asyncio.TimeoutError:
                return "late"
            inside += 1
            try:
                assert inside <= most
                await steps(length)
            finally:
                inside -= 1
                slots.release()
            return "served"

        async def cancel(task: asyncio.Task[str], after: int) -> None:
            await steps(after)
            if task.cancel():
                with pytest.raises(asyncio.CancelledError):
                    await task

        tasks = [asyncio.create_task(ask(length, waits)) for length, _, waits in askers]
        await asyncio.gather(
            *(
                cancel(task, after)
                for task, (_, after, _) in zip(tasks, askers, strict=True)
                if after is not None
            )
        )
        results = await asyncio.gather(*tasks, return_exceptions=True)
        for result, (_, after, waits) in zip(results, askers, strict=True):
            if after is None:
                assert result == "served" or (result == "late" and not waits)
        for _ in range(most):
            await asyncio.wait_for(slots.acquire(), 5)
        assert slots.locked()

    asyncio.run(run())
