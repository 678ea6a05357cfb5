"""Runs targets in shards: seeded batches, watched for crashes, hangs and memory."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import resource
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.fuzz.artifacts import ArtifactTarget
from benchmarks.fuzz.configs import ConfigTarget
from benchmarks.fuzz.payloads import PayloadTarget
from benchmarks.fuzz.segments import FolderTarget, SegmentTarget
from benchmarks.fuzz.streams import StreamTarget
from benchmarks.fuzz.target import Target, Violation

__all__ = ["TARGETS", "Tally", "replay", "run_batches", "run_target"]

TARGETS: dict[str, Callable[[], Target]] = {
    "stream": StreamTarget,
    "payload": PayloadTarget,
    "segment": SegmentTarget,
    "folder": FolderTarget,
    "artifact": ArtifactTarget,
    "config": ConfigTarget,
}

#: Cases that follow from one seed; the unit that is handed out, watched and replayed.
BATCH = 1000

#: A few cases that take longer than this hang, and their shard ends with the stacks of its threads.
_HANG_S = 120.0
_WATCH_EVERY = 50

#: Every how many cases the memory of one is measured: tracing makes it many times slower.
_TRACE_EVERY = 200


@dataclass
class Tally:
    """What became of the cases of one shard or of all."""

    outcomes: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    slowest_ms: float = 0.0
    traced: int = 0
    #: Largest share of its allocation bound that a case has used.
    memory_share: float = 0.0
    peak_rss_growth_mib: float = 0.0

    @property
    def cases(self) -> int:
        """Cases judged."""
        return sum(self.outcomes.values())

    def add(self, other: Tally) -> None:
        """Take in another tally."""
        self.outcomes += other.outcomes
        self.findings += other.findings
        self.slowest_ms = max(self.slowest_ms, other.slowest_ms)
        self.traced += other.traced
        self.memory_share = max(self.memory_share, other.memory_share)
        self.peak_rss_growth_mib = max(self.peak_rss_growth_mib, other.peak_rss_growth_mib)


def run_batches(
    target: Target, seed: int, batches: range, *, size: int = BATCH, keep: Path | None = None
) -> Tally:
    """Judge some batches of cases; findings are written below `keep`."""
    tally = Tally()
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for batch in batches:
        random = Random(f"{seed} {target.name} {batch}")
        for index in range(size):
            if index % _WATCH_EVERY == 0:
                faulthandler.dump_traceback_later(_HANG_S, exit=True)
            case = target.make(random)
            # Not right behind the watch's new thread: what a thread frees before it has the interpreter's
            # lock may crash CPython where tracemalloc starts or stops meanwhile.
            traced = (batch * size + index) % _TRACE_EVERY == _WATCH_EVERY // 2
            start = time.perf_counter()
            try:
                outcome = _judge_traced(target, case, tally) if traced else target.judge(case)
            except Exception as error:
                outcome = "FINDING"
                place = f"{target.name}-{seed}-{batch}-{index}"
                tally.findings.append(f"{place}: {type(error).__name__}: {error}"[:400])
                if keep is not None:
                    keep.mkdir(parents=True, exist_ok=True)
                    (keep / f"{place}.pickle").write_bytes(pickle.dumps(case))
            if not traced:
                tally.slowest_ms = max(tally.slowest_ms, 1e3 * (time.perf_counter() - start))
            tally.outcomes[outcome] += 1
        faulthandler.cancel_dump_traceback_later()
    tally.peak_rss_growth_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - rss) / 1024
    return tally


def replay(place: str, case: Any = None) -> str:
    """Judge one case again, by its place ``<target>-<seed>-<batch>-<index>``; returns the outcome."""
    name, seed, batch, index = place.split("-")
    target = TARGETS[name]()
    random = Random(f"{seed} {name} {batch}")
    for _ in range(int(index) + 1):
        case = target.make(random)
    return target.judge(case)


def _judge_traced(target: Target, case: Any, tally: Tally) -> str:
    tracemalloc.start(1)
    try:
        outcome = target.judge(case)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    share = peak / target.bound(case)
    tally.traced += 1
    tally.memory_share = max(tally.memory_share, share)
    if share > 1:
        raise Violation(f"judging took {peak} bytes, the bound is {target.bound(case)}")
    return outcome


def run_target(name: str, cases: int, *, seed: int, workers: int, keep: Path) -> tuple[Tally, float]:
    """Judge about `cases` cases in processes of their own; returns the tally and the seconds it took."""
    batches = max(1, -(-cases // BATCH))
    # Spawned: NIXL and torch are not made for forks.
    context = multiprocessing.get_context("spawn")
    start = time.perf_counter()
    total = Tally()
    shards: list[tuple[Any, Any, range]] = []
    for worker in range(min(workers, batches)):
        part = range(worker, batches, workers)
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=_shard, args=(name, seed, part, keep, send))
        process.start()
        send.close()
        shards.append((process, receive, part))
    for process, receive, part in shards:
        try:
            total.add(receive.recv())
        except EOFError:
            process.join()
            total.findings.append(f"{name}: a shard ended with {process.exitcode} in batches {part}")
            total.outcomes["FINDING"] += 1
        process.join()
    return total, time.perf_counter() - start


def _shard(name: str, seed: int, batches: range, keep: Path, send: Any) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    send.send(run_batches(TARGETS[name](), seed, batches, keep=keep))
    send.close()


def summary(tally: Tally, seconds: float) -> Mapping[str, Any]:
    """Return a tally as it stands in a result file."""
    return {
        "cases": tally.cases,
        "findings": tally.findings,
        "seconds": round(seconds, 1),
        "cases_per_s": round(tally.cases / seconds),
        "outcomes": dict(tally.outcomes.most_common()),
        "slowest_case_ms": round(tally.slowest_ms, 2),
        "memory": {
            "traced_cases": tally.traced,
            "largest_share_of_bound": round(tally.memory_share, 3),
            "peak_rss_growth_mib": round(tally.peak_rss_growth_mib, 1),
        },
    }
