import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

from dynamo_kvtc.blocking import run_all, run_to_end
from dynamo_kvtc.pipeline.threads import single_threaded_pool


async def test_result_and_error_are_passed_on() -> None:
    with ThreadPoolExecutor(1) as executor:
        assert await run_to_end(executor, lambda: 7) == 7
        with pytest.raises(ZeroDivisionError):
            await run_to_end(executor, lambda: 1 // 0)


async def test_a_cancelled_caller_waits_until_the_thread_is_done_with_its_buffers() -> None:
    started, finish, finished = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        assert finish.wait(10)
        finished.set()

    with ThreadPoolExecutor(1) as executor:
        task = asyncio.create_task(run_to_end(executor, work))
        await asyncio.to_thread(started.wait, 10)
        for _ in range(2):  # a second cancellation must not cut the waiting short either
            task.cancel()
            await asyncio.sleep(0.01)
            assert not task.done()
        finish.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert finished.is_set()


async def test_work_runs_side_by_side_and_is_reported_in_order() -> None:
    together, reported = threading.Barrier(3), []

    def work(index: int) -> int:
        together.wait(10)  # passes only if all three run at the same time
        return index * index

    with ThreadPoolExecutor(3) as executor:
        works = [partial(work, index) for index in range(3)]
        assert await run_all(executor, works, reported.append) == [0, 1, 4]
    assert reported == [0, 1, 2]
    assert await run_all(executor, []) == []


async def test_a_failure_is_raised_when_everything_is_over() -> None:
    release, over, reported = threading.Event(), threading.Event(), []

    def late() -> None:
        assert release.wait(10)
        over.set()

    with ThreadPoolExecutor(3) as executor:
        task = asyncio.create_task(run_all(executor, [lambda: None, lambda: 1 // 0, late], reported.append))
        await asyncio.sleep(0.05)
        assert not task.done()
        release.set()
        with pytest.raises(ZeroDivisionError):
            await task
        assert over.is_set()
    assert reported == [0]


def test_threads_of_the_pool_use_one_core_and_no_others_do() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with single_threaded_pool(2, "test") as pool:
            pool_threads = set(pool.map(lambda _: torch.get_num_threads(), range(8)))
            with ThreadPoolExecutor(1) as other:
                assert other.submit(torch.get_num_threads).result() == 3
        assert pool_threads == {1}
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
