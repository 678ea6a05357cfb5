"""Running blocking work for the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

__all__ = ["run_all", "run_to_end", "single_threaded_pool"]

T = TypeVar("T")

_START_TIMEOUT_S = 30.0


async def run_to_end(executor: Executor, work: Callable[[], T]) -> T:
    """Run `work` on the executor; a cancelled caller still waits until it is over.

    A thread cannot be stopped, and what it reads and writes (staging memory, cache blocks) must not be
    given to anybody else before it has finished. The cancellation is then passed on.
    """
    return (await run_all(executor, [work]))[0]


async def run_all(
    executor: Executor, works: Sequence[Callable[[], T]], on_result: Callable[[int], None] = lambda _: None
) -> list[T]:
    """Run several pieces of work side by side, all to their end as `run_to_end` does.

    Parameters
    ----------
    on_result : Callable[[int], None]
        Called on the event loop with each index in order, as soon as that piece and all before it are
        done; not after a failure or a cancellation.

    Raises
    ------
    BaseException
        The first failure in the order of `works`, when all are over.
    """
    loop = asyncio.get_running_loop()
    futures = [loop.run_in_executor(executor, work) for work in works]
    stopped: BaseException | None = None
    results = []
    for index, future in enumerate(futures):
        stopped = await _wait_out(future) or stopped
        failure = None if future.cancelled() else future.exception()
        stopped = stopped or failure
        if stopped is None:
            results.append(future.result())
            on_result(index)
    if stopped is not None:
        raise stopped
    return results


async def _wait_out(future: asyncio.Future[Any]) -> asyncio.CancelledError | None:
    """Wait for a future whatever happens; return the cancellation that came meanwhile."""
    cancelled = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancelled = error
    return cancelled


def single_threaded_pool(workers: int, name: str) -> ThreadPoolExecutor:
    """Return a running pool whose threads compute torch's operations each on one core.

    Several small products side by side use the cores better than one after the other on all cores, and do
    not wait at barriers for a core that the engine has taken. Other threads keep torch's own setting.
    """
    before = torch.get_num_threads()
    started = threading.Barrier(workers + 1)

    def start() -> None:
        # The first call makes torch note that this thread has its setting; the second changes it here.
        torch.get_num_threads()
        torch.set_num_threads(1)
        started.wait(_START_TIMEOUT_S)

    pool = ThreadPoolExecutor(workers, thread_name_prefix=name, initializer=start)
    for _ in range(workers):
        pool.submit(lambda: None)
    started.wait(_START_TIMEOUT_S)
    # set_num_threads also changes what threads made later begin with: put that back.
    torch.set_num_threads(before)
    return pool
