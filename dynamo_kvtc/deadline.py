"""Awaiting with a deadline, such that no cancellation is lost and nothing that was acquired leaks."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

__all__ = ["in_time", "wait_out"]

T = TypeVar("T")


async def in_time(
    awaitable: Awaitable[T], timeout_s: float, give_back: Callable[[T], object] | None = None
) -> T:
    """Await something for `timeout_s` seconds at most.

    In place of `asyncio.wait_for`, which before Python 3.12 can swallow a cancellation that comes in the
    same step of the event loop as the result.

    When the deadline passes, or the caller is cancelled, what is awaited is cancelled and its end awaited: it
    is over when this returns.

    Parameters
    ----------
    awaitable : Awaitable
        A coroutine runs as a task of its own.
    give_back : Callable, optional
        Called with the result if the caller was cancelled and will not get it: releases what was acquired.

    Returns
    -------
    T
        The result, also if it came after the deadline in spite of being cancelled.

    Raises
    ------
    asyncio.TimeoutError
        If it did not end in time.
    asyncio.CancelledError
        If the caller was cancelled, whatever has become of the awaitable, or if that was cancelled by others.
    """
    task = asyncio.ensure_future(awaitable)
    try:
        done, _ = await asyncio.wait({task}, timeout=max(0.0, timeout_s))
        if not done:
            task.cancel()
            await asyncio.wait({task})
    except asyncio.CancelledError:
        await _end(task)
        if not task.cancelled() and task.exception() is None and give_back is not None:
            give_back(task.result())
        raise
    if not done and task.cancelled():
        raise asyncio.TimeoutError
    return task.result()


async def wait_out(future: asyncio.Future[Any]) -> asyncio.CancelledError | None:
    """Wait for a future whatever happens, without cancelling it.

    Returns
    -------
    asyncio.CancelledError or None
        The cancellation of the caller that came meanwhile, for the caller to raise.
    """
    cancelled = None
    while not future.done():
        try:
            await asyncio.wait({future})
        except asyncio.CancelledError as error:
            # Its traceback holds this frame, and that the future's result.
            cancelled = error.with_traceback(None)
    return cancelled


async def _end(task: asyncio.Future[Any]) -> None:
    """Cancel a task and wait until it is over, whoever else is cancelled meanwhile."""
    while not task.done():
        task.cancel()
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            continue  # the caller passes on the first one
