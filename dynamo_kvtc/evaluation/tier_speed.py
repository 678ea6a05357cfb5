"""How fast tiers take and give objects here, and how fast they find a prefix."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from dynamo_kvtc.tiers.base import KEY_BYTES, ReadRequest, Tier, TierKey
from dynamo_kvtc.transfer.agent import TransferAgent

__all__ = ["TierSpeed", "measure_tier"]

_TIMEOUT_S = 60.0

#: Bytes of the objects that only fill the index.
_SMALL_OBJECT_BYTES = 64


@dataclass(frozen=True, slots=True)
class TierSpeed:
    """Speed of one tier.

    Attributes
    ----------
    name : str
        The tier's name.
    objects, object_bytes : int
        What was moved in one run.
    write_bytes_per_s : float
        Storing objects one after the other, as offloading does.
    read_bytes_per_s : float
        Reading all of them in one batch; of a disk tier without direct I/O, out of the page cache.
    prefix_keys : int
        Keys in the prefix that was looked up, all of them stored.
    lookup_s : float
        Seconds to find it.
    """

    name: str
    objects: int
    object_bytes: int
    write_bytes_per_s: float
    read_bytes_per_s: float
    prefix_keys: int
    lookup_s: float


async def measure_tier(
    tier: Tier,
    agent: TransferAgent,
    *,
    objects: int = 32,
    object_bytes: int = 256 * 1024,
    prefix_keys: int = 1000,
    repetitions: int = 5,
) -> TierSpeed:
    """Measure a tier; medians of several runs. What was stored is evicted again.

    Parameters
    ----------
    tier : Tier
        Must be able to hold all objects at once.
    agent : TransferAgent
        The agent that the tier was opened with.

    Raises
    ------
    TierError, TransferError
        If the tier fails.
    """
    region = await agent.allocate(objects * object_bytes)
    try:
        spans = [region.span(index * object_bytes, object_bytes) for index in range(objects)]
        for number, span in enumerate(spans):
            span.view[:] = bytes([number % 256]) * object_bytes
        write_s, read_s = [], []
        for run in range(repetitions):
            keys = _keys(f"object {run}", objects)
            start = time.perf_counter()
            for key, span in zip(keys, spans, strict=True):
                await tier.put(key, span, timeout_s=_TIMEOUT_S)
            written = time.perf_counter()
            reads = [ReadRequest(key, 0, span) for key, span in zip(keys, spans, strict=True)]
            await tier.get(reads, timeout_s=_TIMEOUT_S)
            read_s.append(time.perf_counter() - written)
            write_s.append(written - start)
            await tier.evict(keys)
        small = region.span(0, min(_SMALL_OBJECT_BYTES, object_bytes))
        prefix = _keys("prefix", prefix_keys)
        await asyncio.gather(*(tier.put(key, small, timeout_s=_TIMEOUT_S) for key in prefix))
        lookup_s = await _lookup_seconds(tier, prefix, repetitions)
        await tier.evict(prefix)
    finally:
        await agent.free(region)
    return TierSpeed(
        name=tier.name,
        objects=objects,
        object_bytes=object_bytes,
        write_bytes_per_s=objects * object_bytes / statistics.median(write_s),
        read_bytes_per_s=objects * object_bytes / statistics.median(read_s),
        prefix_keys=prefix_keys,
        lookup_s=lookup_s,
    )


async def _lookup_seconds(tier: Tier, prefix: Sequence[TierKey], repetitions: int) -> float:
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        await tier.contains_prefix(prefix)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _keys(label: str, count: int) -> list[TierKey]:
    prefix = label.encode().ljust(KEY_BYTES - 8, b"\0")
    return [prefix + index.to_bytes(8, "big") for index in range(count)]
