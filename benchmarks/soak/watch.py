"""Measurements beside a load: how long the event loop was blocked, by what, and what is in use.

A callback keeps the loop from everything else from its first to its last moment. That time has four parts:

- processor time of what the callback does itself;
- garbage collection of Python's that strikes the loop's thread: it looks at every object of the process;
- waiting while not runnable: for the interpreter's lock that other threads hold, or in a system call;
- waiting while runnable, because every processor runs something else. Linux counts it for each thread in
  ``/proc/thread-self/schedstat``.

In a virtual machine the hypervisor takes processors away now and then. A thread that runs meanwhile has it
counted as its own processor time; ``/proc/stat`` tells for the whole machine how much was taken, in
hundredths of a second. So that much is told of each callback beyond the limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import os
import resource
import threading
import time
from array import array
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["LoopWatch", "resources"]

# How often the loop is asked to answer.
_INTERVAL_S = 0.002

#: What counts as blocked, in ms.
_LIMIT_MS = 10.0

_PLACES = {"median": 0.5, "p99": 0.99, "p99.9": 0.999, "p99.99": 0.9999}

#: How many callbacks beyond the limit are told one by one.
_MOST_TOLD = 20


class _Times:
    """Durations in ms, as counts in buckets a tenth apart.

    Neither memory nor a list for the garbage collector to look at grows: that is what is measured here.
    """

    _LEAST, _STEP, _BUCKETS = 1e-3, 1.1, 256

    def __init__(self) -> None:
        self._counts = array("Q", bytes(8 * self._BUCKETS))
        self.longest = 0.0
        self.beyond = 0

    def add(self, ms: float) -> None:
        """Count a duration."""
        place = int(math.log(max(ms, self._LEAST) / self._LEAST) / math.log(self._STEP))
        self._counts[min(place, self._BUCKETS - 1)] += 1
        self.longest = max(self.longest, ms)
        self.beyond += ms > _LIMIT_MS

    def __len__(self) -> int:
        return sum(self._counts)

    def summary(self) -> dict[str, float]:
        """Return what share of the durations lies below what (at most a tenth less), and the longest."""
        found = {}
        for name, share in _PLACES.items():
            total = place = 0
            while total + self._counts[place] < share * len(self):
                total += self._counts[place]
                place += 1
            found[name] = round(min(self.longest, self._LEAST * self._STEP ** (place + 1)), 3)
        return {**found, "max": round(self.longest, 3)}


@dataclass(slots=True)
class _Callback:
    """What callbacks of one name took, in ms: the longest, and all."""

    calls: int = 0
    longest_work: float = 0.0
    longest_cpu: float = 0.0
    longest_blocked: float = 0.0
    total_cpu: float = 0.0


class LoopWatch:
    """Measures how late a task of the loop is woken, and how long each callback keeps the loop to itself.

    Parameters
    ----------
    own : tuple[str, ...]
        Names of tasks and functions of the load, whose callbacks do not count.

    Attributes
    ----------
    late : _Times
        Of every wake-up, by how much it came after its time: many short callbacks in a row, and on a busy
        machine everybody else's work, are in it.
    callbacks : dict[str, _Callback]
        By the name of its task or function.
    """

    def __init__(self, own: tuple[str, ...] = ()) -> None:
        self.late = _Times()
        self.callbacks: defaultdict[str, _Callback] = defaultdict(_Callback)
        self._own = frozenset(own)
        # Processor time of the callbacks' own work; with garbage collection; with waiting for locks and
        # system calls as well; with waiting for a processor, too.
        self._times = {name: _Times() for name in ("work", "cpu", "blocked", "wall")}
        self._long: list[str] = []
        self._collections: list[int] = [0, 0, 0]
        self._longest_collection_ms = [0.0, 0.0, 0.0]
        self._collecting_since = 0.0
        self._collected_ms = 0.0
        self._stolen_ms = _stolen_ms()
        self._thread = 0

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[LoopWatch]:
        """Watch the running loop."""
        run = asyncio.events.Handle._run
        self._thread = threading.get_ident()

        with _processor_waits() as waited_ms:

            def timed(handle: asyncio.events.Handle) -> None:
                waited, collected = waited_ms(), self._collected_ms
                used = resource.getrusage(resource.RUSAGE_THREAD)
                wall, cpu = time.perf_counter(), time.thread_time()
                run(handle)
                cpu = 1e3 * (time.thread_time() - cpu)
                wall = 1e3 * (time.perf_counter() - wall)
                work = cpu - (self._collected_ms - collected)
                blocked = max(cpu, wall - (waited_ms() - waited))
                self._note(handle, {"work": work, "cpu": cpu, "blocked": blocked, "wall": wall}, used)

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

    def _note(self, handle: Any, took: dict[str, float], before: resource.struct_rusage) -> None:
        owner = getattr(handle._callback, "__self__", None)
        if isinstance(owner, asyncio.Task):
            name = owner.get_coro().__qualname__  # type: ignore[union-attr]
        else:
            name = getattr(handle._callback, "__qualname__", type(handle._callback).__name__)
        if name in self._own:
            return
        noted = self.callbacks[name]
        noted.calls += 1
        noted.longest_work = max(noted.longest_work, took["work"])
        noted.longest_cpu = max(noted.longest_cpu, took["cpu"])
        noted.longest_blocked = max(noted.longest_blocked, took["blocked"])
        noted.total_cpu += took["cpu"]
        for kind, ms in took.items():
            self._times[kind].add(ms)
        if took["wall"] > _LIMIT_MS and len(self._long) < _MOST_TOLD:
            now = resource.getrusage(resource.RUSAGE_THREAD)
            # Since the last wake-up of the watch, which was at most one round of the loop before.
            stolen = _stolen_ms() - self._stolen_ms
            self._long.append(
                f"{name}: "
                + ", ".join(f"{kind} {ms:.1f}" for kind, ms in took.items())
                + f"; stolen from the machine {stolen:.0f}"
                f"; user {1e3 * (now.ru_utime - before.ru_utime):.1f}"
                f", system {1e3 * (now.ru_stime - before.ru_stime):.1f}"
                f", page faults {now.ru_minflt - before.ru_minflt}+{now.ru_majflt - before.ru_majflt}"
                f", preempted {now.ru_nivcsw - before.ru_nivcsw}, gave way {now.ru_nvcsw - before.ru_nvcsw}"
            )

    def _note_collection(self, phase: str, info: dict[str, int]) -> None:
        """Python's garbage collector runs in whichever thread it strikes, with the interpreter's lock."""
        now = time.thread_time()
        if phase == "start":
            self._collecting_since = now
            return
        generation = info["generation"]
        self._collections[generation] += 1
        took = 1e3 * (now - self._collecting_since)
        self._longest_collection_ms[generation] = max(self._longest_collection_ms[generation], took)
        if threading.get_ident() == self._thread:
            self._collected_ms += took

    async def _run(self) -> None:
        while True:
            start = time.perf_counter()
            self._stolen_ms = _stolen_ms()
            await asyncio.sleep(_INTERVAL_S)
            self.late.add(1e3 * (time.perf_counter() - start - _INTERVAL_S))

    def summary(self) -> dict[str, Any]:
        """Return the distributions, JSON-ready, without the callbacks of the load."""
        by_longest = sorted(self.callbacks.items(), key=lambda item: -item[1].longest_work)
        return {
            "callbacks_ms": {name: times.summary() for name, times in self._times.items()},
            "callbacks_over_10_ms": {name: times.beyond for name, times in self._times.items()},
            "num_callbacks": len(self._times["wall"]),
            "over_10_ms": self._long,
            "callbacks": {
                name: {
                    "calls": noted.calls,
                    "longest_work_ms": round(noted.longest_work, 3),
                    "longest_cpu_ms": round(noted.longest_cpu, 3),
                    "longest_blocked_ms": round(noted.longest_blocked, 3),
                    "total_cpu_ms": round(noted.total_cpu),
                }
                for name, noted in by_longest[:10]
            },
            "late_ms": self.late.summary(),
            "samples": len(self.late),
            "garbage_collections": self._collections,
            "longest_garbage_collection_cpu_ms": [round(ms, 3) for ms in self._longest_collection_ms],
        }


@contextlib.contextmanager
def _processor_waits() -> Iterator[Any]:
    """Give a function: milliseconds for which this thread has waited for a processor so far."""
    try:
        file = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
    except OSError:  # a kernel without CONFIG_SCHED_INFO: everything counts as ours
        yield lambda: 0.0
        return
    try:
        yield lambda: int(os.pread(file, 64, 0).split()[1]) / 1e6
    finally:
        os.close(file)


def _stolen_ms() -> float:
    """Return how long a hypervisor has kept its processors from this machine; 0 if that is not told."""
    try:
        with Path("/proc/stat").open("rb") as file:
            return int(file.readline().split()[8]) * 1e3 / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError):
        return 0.0


def resources() -> dict[str, float]:
    """Return what this process uses: resident memory in MiB, file descriptors, threads, asyncio tasks."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "resident_mib": round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1),
        "file_descriptors": sum(1 for _ in Path("/proc/self/fd").iterdir()),
        "threads": threading.active_count(),
        "tasks": len(asyncio.all_tasks()),
    }
