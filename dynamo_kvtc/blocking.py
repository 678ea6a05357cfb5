"""Running blocking work for the event loop, to its end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import TypeVar

from dynamo_kvtc.deadline import wait_out

__all__ = ["run_all", "run_to_end"]

T = TypeVar("T")


async def run_to_end(
    executor: Executor | None, work: Callable[[], T], give_back: Callable[[T], object] | None = None
) -> T:
    """Run `work` on the executor; a cancelled caller still waits until it is over.

    A thread cannot be stopped, and what it reads and writes (staging memory, cache blocks) must not be
    given to anybody else before it has finished. The cancellation is then passed on.

    Parameters
    ----------
    executor : Executor, optional
        None: the event loop's own threads.
    give_back : Callable, optional
        Called with the result if the caller was cancelled and will not get it: releases what was acquired.
    """
    got: list[T] = []
    try:
        await run_all(executor, [lambda: got.append(work())])
    except asyncio.CancelledError:
        if got and give_back is not None:
            give_back(got[0])
        raise
    return got[0]


async def run_all(
    executor: Executor | None,
    works: Sequence[Callable[[], T]],
    on_result: Callable[[int], None] = lambda _: None,
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
        stopped = await wait_out(future) or stopped
        failure = None if future.cancelled() else future.exception()
        stopped = stopped or failure
        if stopped is None:
            results.append(future.result())
            on_result(index)
    if stopped is not None:
        try:
            raise stopped
        finally:
            # Its traceback holds this frame: what the works have returned must not stay with it.
            del stopped, failure, future, futures, results
    return results
