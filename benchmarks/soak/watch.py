"""Measurements beside a load: how long the event loop was blocked, and what is in use."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

__all__ = ["LoopWatch", "resources"]

# How often the loop is asked to answer.
_INTERVAL_S = 0.002


class LoopWatch:
    """Measures how late a task of the loop is woken, and how long each callback keeps the loop to itself.

    Attributes
    ----------
    late_ms : list[float]
        Of every wake-up, by how much it came after its time: many short callbacks in a row, and on a busy
        machine everybody else's work, are in it.
    callbacks : dict[str, tuple[int, float, float]]
        By the name of its task or function: calls, the longest one's processor time, and that of all, in
        ms. Garbage collection that strikes the loop's thread is in it.
    """

    def __init__(self) -> None:
        self.late_ms: list[float] = []
        self.callbacks: dict[str, tuple[int, float, float]] = {}
        self.collections = 0
        self.longest_collection_ms = 0.0
        self._collecting_since = 0.0

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[LoopWatch]:
        """Watch the running loop."""
        run = asyncio.events.Handle._run

        def timed(handle: asyncio.events.Handle) -> None:
            start = time.thread_time()
            run(handle)
            self._note(handle, 1e3 * (time.thread_time() - start))

        asyncio.events.Handle._run = timed  # type: ignore[method-assign,assignment]
        gc.callbacks.append(self._note_collection)
        task = asyncio.ensure_future(self._run())
        try:
            yield self
        finally:
            asyncio.events.Handle._run = run  # type: ignore[method-assign]
            gc.callbacks.remove(self._note_collection)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    def _note(self, handle: Any, ms: float) -> None:
        owner = getattr(handle._callback, "__self__", None)
        if isinstance(owner, asyncio.Task):
            name = owner.get_coro().__qualname__  # type: ignore[union-attr]
        else:
            name = getattr(handle._callback, "__qualname__", type(handle._callback).__name__)
        calls, longest, total = self.callbacks.get(name, (0, 0.0, 0.0))
        self.callbacks[name] = calls + 1, max(longest, ms), total + ms

    def _note_collection(self, phase: str, _: dict[str, int]) -> None:
        """Python's garbage collector runs in whichever thread it strikes, the loop's too."""
        now = time.thread_time()
        if phase == "start":
            self._collecting_since = now
        else:
            self.collections += 1
            self.longest_collection_ms = max(self.longest_collection_ms, 1e3 * (now - self._collecting_since))

    async def _run(self) -> None:
        while True:
            start = time.perf_counter()
            await asyncio.sleep(_INTERVAL_S)
            self.late_ms.append(1e3 * (time.perf_counter() - start - _INTERVAL_S))

    def summary(self, own: tuple[str, ...]) -> dict[str, Any]:
        """Return the distributions, JSON-ready, without the callbacks of the load, named in `own`."""
        late = sorted(self.late_ms)
        product = {name: value for name, value in self.callbacks.items() if name not in own}
        places = {"median": 0.5, "p99": 0.99, "p99.9": 0.999, "max": 1.0}
        by_longest = sorted(product.items(), key=lambda item: -item[1][1])
        return {
            "longest_callback_cpu_ms": round(max(longest for _, longest, _ in product.values()), 3),
            "callbacks": {
                name: {"calls": calls, "longest_cpu_ms": round(longest, 3), "total_cpu_ms": round(total)}
                for name, (calls, longest, total) in by_longest[:10]
            },
            "late_ms": {
                name: round(late[min(len(late) - 1, int(at * len(late)))], 3) for name, at in places.items()
            },
            "samples": len(late),
            "garbage_collections": self.collections,
            "longest_garbage_collection_cpu_ms": round(self.longest_collection_ms, 3),
        }


def resources() -> dict[str, float]:
    """Return what this process uses: resident memory in MiB, file descriptors, threads, asyncio tasks."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "resident_mib": round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1),
        "file_descriptors": sum(1 for _ in Path("/proc/self/fd").iterdir()),
        "threads": threading.active_count(),
        "tasks": len(asyncio.all_tasks()),
    }
