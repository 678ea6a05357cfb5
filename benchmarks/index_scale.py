"""Memory and speed of the object index: a million tier blocks, lookups of a 1,000-block prefix.

    python benchmarks/index_scale.py [--objects 1000000] [--json FILE]

Memory is counted twice: what Python's allocator holds for the index (tracemalloc, in a run of its own,
since tracing slows everything down), and by how much the resident set of the process grows.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterable
from pathlib import Path

from dynamo_kvtc.evaluation.environment import describe_environment
from dynamo_kvtc.tiers.base import TierKey
from dynamo_kvtc.tiers.index import Location, ObjectIndex

PREFIX = 1000
REPEATS = 50
GOALS = {"resident_mb": 300.0, "prefix_ms": 2.0}


def keys(first: int, count: int) -> Iterable[TierKey]:
    for number in range(first, first + count):
        yield hashlib.blake2b(number.to_bytes(8, "little"), digest_size=32).digest()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def filled(objects: int) -> ObjectIndex:
    index = ObjectIndex()
    for number, key in enumerate(keys(0, objects)):
        index.add(
            key,
            Location(
                number >> 10, number << 12, 150_000 + number % 4096, number * 0x9E3779B97F4A7C15 % 2**64
            ),
        )
    return index


def traced_bytes(objects: int) -> int:
    tracemalloc.start()
    index = filled(objects)
    gc.collect()
    size, _ = tracemalloc.get_traced_memory()
    assert len(index) == objects
    return size


def measure(objects: int) -> dict[str, float]:
    gc.collect()
    before = resident_bytes()
    begun = time.perf_counter()
    index = filled(objects)
    add_us = (time.perf_counter() - begun) / objects * 1e6
    resident = resident_bytes() - before

    prefix_ms = []
    for repeat in range(REPEATS):
        # New key objects each time, as a request brings them: nothing is cached but the index itself.
        prefix = list(keys(repeat * 7919 % (objects - PREFIX), PREFIX))
        begun = time.perf_counter()
        found = index.touch_prefix(prefix)
        prefix_ms.append((time.perf_counter() - begun) * 1e3)
        assert found == PREFIX
    absent = list(keys(objects, PREFIX))
    begun = time.perf_counter()
    assert index.touch_prefix(absent) == 0
    miss_ms = (time.perf_counter() - begun) * 1e3

    replaced = min(objects, 100_000)
    begun = time.perf_counter()
    for number, key in enumerate(keys(2 * objects, replaced)):
        index.remove(next(index.oldest_first()))
        index.add(key, Location(0, number, 1))
    replace_us = (time.perf_counter() - begun) / replaced * 1e6
    return {
        "objects": objects,
        "resident_mb": resident / 1e6,
        "add_us": add_us,
        "prefix_ms": statistics.median(prefix_ms),
        "prefix_worst_ms": max(prefix_ms),
        "prefix_miss_ms": miss_ms,
        "evict_and_add_us": replace_us,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objects", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--traced", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.objects <= PREFIX:
        parser.error(f"--objects must exceed the prefix of {PREFIX}")
    if options.traced:
        print(traced_bytes(options.objects))
        return 0
    figures = measure(options.objects)
    command = [sys.executable, __file__, "--traced", "--objects", str(options.objects)]
    figures["traced_mb"] = (
        int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 1e6
    )
    for name, value in figures.items():
        goal = f"   goal: under {GOALS[name]:g}" if name in GOALS else ""
        print(f"{name:>18} {value:>14,.3f}{goal}")
    if options.json:
        result = {**figures, "environment": describe_environment()}
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return int(any(figures[name] >= goal for name, goal in GOALS.items()))


if __name__ == "__main__":
    raise SystemExit(main())
