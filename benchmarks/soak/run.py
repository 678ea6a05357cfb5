"""Sessions that look up, onboard, compute and offload, all at once, with everything real but the model.

Each session draws a prompt of shared and own tier blocks, asks what is stored, onboards it, checks what came
against what the codec alone makes of it, "computes" the rest, and offloads it all. Some give up half-way. The
host arena holds a part of what is used, so objects come and go in both tiers all the time.
"""

from __future__ import annotations

import asyncio
import gc
import tempfile
import time
from array import array
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import torch

from benchmarks.soak.watch import LoopWatch, resources
from dynamo_kvtc.calibration.artifact import load_artifact
from dynamo_kvtc.codec.base import TierBlock
from dynamo_kvtc.config import load_config
from dynamo_kvtc.errors import OnboardError
from dynamo_kvtc.pipeline.adapter import TierAdapter
from dynamo_kvtc.pipeline.assemble import open_adapter
from dynamo_kvtc.pipeline.blocks import SequenceBlocks
from dynamo_kvtc.pipeline.paged import PagedKvCache

__all__ = ["SoakSettings", "soak"]

BLOCK_SIZE = 16
TIER_BLOCK = 64
_PER_TIER_BLOCK = TIER_BLOCK // BLOCK_SIZE

# Decisions are not what is tried here: the artifact is not fitted, so the guard would stop storing.
# One thread decodes, so that on two cores the event loop is not measured while it waits for one of them.
_CONFIG = """
artifact: {artifact}
codec: {{ratio: 10, compute_dtype: float32, threads: 1}}
tiers:
  - kind: host
    capacity: {host}
  - kind: disk
    path: tier
    capacity: {disk}
    segment_size: 1MiB
policy: {{tier_block_tokens: 64, recent_window: 0, minimum_tokens: 0, decide: always, guard: {{share: 0}}}}
transfer: {{staging: 4MiB, timeout: 10s}}
pipeline: {{offload_queue: 64, decode_threads: 1, onboard_timeout: 20s}}
observability: {{log_level: error}}
"""


@dataclass(frozen=True)
class SoakSettings:
    """How long, how many sessions at once, and from what seed."""

    seconds: float = 600.0
    sessions: int = 300
    seed: int = 1
    host_kib: int = 512
    disk_mib: int = 8
    samples: int = 20


@dataclass
class _Load:
    """What the sessions share, and what became of them."""

    adapter: TierAdapter
    cache: PagedKvCache
    #: For each kind of content: its engine block ids to offload from, and what the codec makes of it.
    sources: list[list[int]]
    free: asyncio.Queue[list[int]]
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    onboards: array[float] = field(default_factory=lambda: array("d"))
    offloads: array[float] = field(default_factory=lambda: array("d"))
    most_host_bytes: int = 0
    sessions: int = 0


async def soak(settings: SoakSettings, artifact: Path) -> dict[str, Any]:
    """Run the load and return what was measured, JSON-ready."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "soak.yaml"
        config.write_text(
            _CONFIG.format(artifact=artifact, host=f"{settings.host_kib}KiB", disk=f"{settings.disk_mib}MiB")
        )
        geometry = load_artifact(artifact).parameters.geometry
        async with await open_adapter(load_config(config, {}), geometry, BLOCK_SIZE) as adapter:
            return await _run(settings, adapter)


async def _run(settings: SoakSettings, adapter: TierAdapter) -> dict[str, Any]:
    contents, places = 64, 48
    blocks = contents * _PER_TIER_BLOCK + places * 8 * _PER_TIER_BLOCK
    geometry = adapter.codec.geometry
    generator = torch.Generator().manual_seed(settings.seed)
    shape = (2, blocks, BLOCK_SIZE, geometry.num_kv_heads, geometry.head_size)
    layers = [
        torch.randn(shape, generator=generator, dtype=geometry.torch_dtype)
        for _ in range(geometry.num_layers)
    ]
    cache = PagedKvCache.from_layers(layers, "2BNHD")
    ids = iter(range(blocks))
    sources = [[next(ids) for _ in range(_PER_TIER_BLOCK)] for _ in range(contents)]
    free: asyncio.Queue[list[int]] = asyncio.Queue()
    for _ in range(places):
        free.put_nowait([next(ids) for _ in range(8 * _PER_TIER_BLOCK)])
    # What was made at start is never garbage: as vLLM does, it is taken out of the collector's sight, whose
    # passes over the modules of torch stop every thread for a tenth of a second otherwise.
    gc.collect()
    gc.freeze()
    load = _Load(adapter, cache, sources, free)
    stop = time.monotonic() + settings.seconds
    samples: list[dict[str, float]] = []
    watch = LoopWatch(own=("_sessions", "soak", "LoopWatch._run", "main"))
    async with watch.watching():
        running = [
            asyncio.ensure_future(_sessions(load, Random(f"{settings.seed} {number}"), stop))
            for number in range(settings.sessions)
        ]
        for sample in range(settings.samples):
            await asyncio.sleep(
                max(0.0, settings.seconds * (sample + 1) / settings.samples - _since(stop, settings))
            )
            host = next(iter(adapter.status().tiers.values()))
            load.most_host_bytes = max(load.most_host_bytes, host.allocated_bytes)
            counters = adapter.counters.snapshot()
            samples.append(
                {
                    "second": round(_since(stop, settings), 1),
                    "onboarded_blocks": counters.onboarded_blocks,
                    "offloaded_blocks": counters.offloaded_blocks,
                    **resources(),
                }
            )
        await asyncio.gather(*running)
    await adapter.tiers.settle()
    await asyncio.sleep(0.2)
    return _summary(settings, load, watch, samples)


def _since(stop: float, settings: SoakSettings) -> float:
    return time.monotonic() - (stop - settings.seconds)


async def _sessions(load: _Load, random: Random, stop: float) -> None:
    """One user after the other, until time is up."""
    while time.monotonic() < stop:
        await _session(load, random)
        load.sessions += 1
        await asyncio.sleep(random.random() * 0.05)


async def _session(load: _Load, random: Random) -> None:
    # A system prompt of a few kinds, then turns of one's own: a path through the contents.
    kind = random.randrange(6)
    length = random.randrange(1, 9)
    path = [
        (kind * 7 + step * (1 + random.randrange(2) * (step > 2))) % len(load.sources)
        for step in range(length)
    ]
    # What follows the system prompt changes with time, or everything would be stored after a while.
    turn = load.sessions // 200 - (random.random() < 0.3)
    own = 3 * _PER_TIER_BLOCK
    hashes = [
        f"{kind}:{path[: index // _PER_TIER_BLOCK + 1]}:{index}:{turn if index >= own else 0}".encode()
        for index in range(length * _PER_TIER_BLOCK)
    ]
    salt = b"tenant-%d" % random.randrange(2)
    found = await load.adapter.lookup(hashes, salt=salt)
    if found:
        await _onboard(load, random, hashes[: found // BLOCK_SIZE], path, salt)
    start = time.perf_counter()
    ids = [block for content in path for block in load.sources[content]]
    ticket = load.adapter.offload(SequenceBlocks(hashes, ids, salt), load.cache)
    await ticket.gathered()
    result = await ticket.wait()
    load.offloads.append(time.perf_counter() - start)
    load.outcomes.update(stored=result.stored, already_stored=result.already_stored, dropped=result.dropped)


async def _onboard(load: _Load, random: Random, hashes: list[bytes], path: list[int], salt: bytes) -> None:
    place = await load.free.get()
    try:
        start = time.perf_counter()
        handle = load.adapter.onboard(SequenceBlocks(hashes, place[: len(hashes)], salt), load.cache)
        if random.random() < 0.05:
            await asyncio.sleep(random.random() * 0.02)
            await handle.cancel()
            load.outcomes["cancelled"] += 1
            return
        tokens = len(hashes) * BLOCK_SIZE
        try:
            await handle.wait()
            load.outcomes["onboarded"] += 1
        except OnboardError as error:
            ((tokens, _),) = error.tokens_to_recompute
            load.outcomes["partly onboarded" if tokens else "missed"] += 1
        load.onboards.append(time.perf_counter() - start)
        if tokens and random.random() < 0.02:
            block = random.randrange(tokens // TIER_BLOCK)
            load.wrong += not await asyncio.to_thread(_is_right, load, place, path, block)
            load.outcomes["checked"] += 1
    finally:
        load.free.put_nowait(place)


def _is_right(load: _Load, place: list[int], path: list[int], block: int) -> bool:
    """Compare one tier block in the cache with what the codec alone makes of its content."""
    ids = place[block * _PER_TIER_BLOCK : (block + 1) * _PER_TIER_BLOCK]
    codec, first = load.adapter.codec, block * TIER_BLOCK
    sinks = load.adapter.policy.sinks_in(first)
    source = TierBlock(*load.cache.gather(load.sources[path[block]]), first, sinks)
    expected = codec.decode(codec.encode([source])[0])
    keys, values = load.cache.gather(ids)
    return keys.equal(expected.keys) and values.equal(expected.values)


def _summary(
    settings: SoakSettings, load: _Load, watch: LoopWatch, samples: list[dict[str, float]]
) -> dict[str, Any]:
    tiers = load.adapter.status().tiers
    counters = load.adapter.counters.snapshot()
    half = samples[len(samples) // 2 :]
    return {
        "seconds": settings.seconds,
        "concurrent_sessions": settings.sessions,
        "sessions": load.sessions,
        "outcomes": dict(load.outcomes),
        "wrong": load.wrong,
        "missed": {str(name): count for name, count in counters.missed_blocks.items()},
        "dropped": {str(name): count for name, count in counters.dropped_blocks.items()},
        "onboard_seconds": _spread(load.onboards),
        "offload_seconds": _spread(load.offloads),
        "host": {
            "capacity_bytes": settings.host_kib << 10,
            "most_allocated_bytes": load.most_host_bytes,
            "evictions": next(iter(tiers.values())).evictions,
        },
        "pinned_at_the_end": sum(stats.pinned_objects for stats in tiers.values()),
        "staging_leased_at_the_end": load.adapter._staging.leased_bytes,
        "event_loop": watch.summary(),
        "growth_in_the_second_half": {
            name: round(half[-1][name] - half[0][name], 1)
            for name in ("resident_mib", "file_descriptors", "threads", "tasks")
        },
        # Between two samples: if one side starved, its least would be nothing.
        "least_progress": {
            name: min(after[name] - before[name] for before, after in pairwise(samples))
            for name in ("onboarded_blocks", "offloaded_blocks")
        },
        "stage_seconds": {str(stage): round(seconds, 1) for stage, seconds in counters.stage_seconds.items()},
        "samples": samples,
    }


def _spread(seconds: array[float]) -> dict[str, float]:
    if not seconds:
        return {}
    ordered = sorted(seconds)
    places = {"median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}
    return {
        name: round(ordered[min(len(ordered) - 1, int(at * len(ordered)))], 4) for name, at in places.items()
    }
