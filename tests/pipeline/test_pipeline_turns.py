"""Turns: never more at once than allowed, the highest priority first, nothing lost to a cancellation."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_kvtc.pipeline.turns import Turns


async def _settle() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


async def test_whoever_waits_comes_by_priority_and_then_by_arrival() -> None:
    turns, served = Turns(1), list[str]()
    end = asyncio.Event()

    async def hold() -> None:
        async with turns.take():
            await end.wait()

    async def serve(name: str, priority: int) -> None:
        async with turns.take(priority):
            served.append(name)

    tasks = [asyncio.create_task(hold())]
    await _settle()
    for name, priority in (("later", 5), ("usual", 0), ("urgent", -2), ("usual too", 0)):
        tasks.append(asyncio.create_task(serve(name, priority)))
    await _settle()
    assert turns.waiting == 4 and served == []
    end.set()
    await asyncio.gather(*tasks)
    assert served == ["urgent", "usual", "usual too", "later"]
    assert turns.waiting == 0


@pytest.mark.parametrize("let_in", [False, True])
async def test_a_cancelled_wait_gives_its_turn_to_the_next(let_in: bool) -> None:
    turns = Turns(1)
    end = asyncio.Event()

    async def hold() -> None:
        async with turns.take():
            await end.wait()

    holder = asyncio.create_task(hold())
    await _settle()
    cancelled = asyncio.create_task(hold())
    await _settle()
    if let_in:  # in the same turn of the loop: let in, and cancelled before it could begin
        end.set()
        holder.cancel()
        await asyncio.sleep(0)
    cancelled.cancel()
    await asyncio.gather(cancelled, return_exceptions=True)
    end.set()
    await asyncio.gather(holder, return_exceptions=True)
    await asyncio.wait_for(hold(), 5)


def test_a_turn_at_least() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Turns(0)


@given(
    st.integers(1, 3),
    st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 4), st.booleans()), max_size=20),
)
def test_never_too_many_and_all_come(at_once: int, askers: list[tuple[int, int, bool]]) -> None:
    """Askers with a priority, a length in turns of the loop, and whether they are cancelled on the way."""

    async def run() -> None:
        turns = Turns(at_once)
        inside = most = ended = 0

        async def ask(priority: int, length: int) -> None:
            nonlocal inside, most, ended
            async with turns.take(priority):
                inside += 1
                most = max(most, inside)
                try:
                    for _ in range(length):
                        await asyncio.sleep(0)
                finally:
                    inside -= 1
            ended += 1

        tasks = [asyncio.create_task(ask(priority, length)) for priority, length, _ in askers]
        await asyncio.sleep(0)
        for task, (_, length, is_cancelled) in zip(tasks, askers, strict=True):
            if is_cancelled:
                for _ in range(length):
                    await asyncio.sleep(0)
                task.cancel()
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
        assert most <= at_once and inside == 0 and turns.waiting == 0
        assert ended >= sum(not is_cancelled for _, _, is_cancelled in askers)
        # All turns are back.
        for _ in range(at_once):
            await asyncio.wait_for(turns.take().__aenter__(), 1)

    asyncio.run(run())
