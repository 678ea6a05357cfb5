import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from dynamo_kvtc.pipeline.threads import run_to_end


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
