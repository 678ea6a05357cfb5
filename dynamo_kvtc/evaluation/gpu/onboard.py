"""End to end: a sequence out of a host tier and out of a disk tier, by the whole pipeline, into the cache."""

from __future__ import annotations

import statistics
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path

from dynamo_kvtc.codec.gpu.gpu_codec import GpuCodec
from dynamo_kvtc.errors import EvaluationError
from dynamo_kvtc.evaluation.gpu.cache import make_cache
from dynamo_kvtc.evaluation.gpu.report import Onboard
from dynamo_kvtc.pipeline.adapter import TierAdapter
from dynamo_kvtc.pipeline.blocks import SequenceBlocks
from dynamo_kvtc.pipeline.paged import PagedKvCache
from dynamo_kvtc.policy import OffloadPolicy
from dynamo_kvtc.tiers.base import Tier
from dynamo_kvtc.tiers.disk import DiskTier
from dynamo_kvtc.tiers.host import HostTier
from dynamo_kvtc.tiers.stack import TierStack
from dynamo_kvtc.transfer.agent import TransferAgent
from dynamo_kvtc.transfer.staging import StagingPool

__all__ = ["measure_onboard"]

_SINKS = 4
_STORE_TIMEOUT_S = 60.0


async def measure_onboard(
    codec: GpuCodec,
    cache: PagedKvCache,
    block_ids: list[int],
    tier_block_tokens: int,
    repetitions: int,
    disk: Path | None,
) -> tuple[Onboard, ...]:
    """Measure onboarding of the sequence that a cache holds: medians, on a GPU after a run not counted.

    Parameters
    ----------
    disk : Path or None
        Folder on the disk to measure; the system's temporary folder if None.

    Raises
    ------
    EvaluationError
        If the folder cannot be used, or a tier block is not stored.
    """
    try:
        folder = tempfile.TemporaryDirectory(prefix="kvtc-bench-", dir=disk)
    except OSError as error:
        raise EvaluationError(f"cannot make a folder in {disk}: {error}; give another") from error
    with folder as path:
        return (
            await _measure(codec, cache, block_ids, tier_block_tokens, repetitions, None),
            await _measure(codec, cache, block_ids, tier_block_tokens, repetitions, Path(path)),
        )


async def _measure(
    codec: GpuCodec,
    cache: PagedKvCache,
    block_ids: list[int],
    tier_block_tokens: int,
    repetitions: int,
    folder: Path | None,
) -> Onboard:
    tokens = len(block_ids) * cache.block_size
    # Streams of all tier blocks at their largest, twice: a tier keeps some room free.
    capacity = 2 * (tokens // tier_block_tokens) * codec.max_stream_bytes(tier_block_tokens, _SINKS) + (
        64 << 20
    )
    async with AsyncExitStack() as opened:
        agent = await opened.enter_async_context(await TransferAgent.create())
        staging = await StagingPool.create(agent, capacity // 2, pinned=codec.device.type == "cuda")
        tier: Tier
        if folder is None:
            tier = await HostTier.open(agent, capacity)
        else:
            tier = await DiskTier.open(agent, folder / "tier", capacity)
        policy = OffloadPolicy(tier_block_tokens, _SINKS, recent_window=0, minimum_tokens=0)
        adapter = await opened.enter_async_context(
            TierAdapter(
                codec.host,
                codec.parameters.artifact_id,
                agent,
                staging,
                TierStack([tier], staging=staging),
                policy,
                cache.block_size,
                device_codec=codec,
                store_timeout_s=_STORE_TIMEOUT_S,
            )
        )
        hashes = [b"block %d" % index for index in range(len(block_ids))]
        blocks = SequenceBlocks(hashes, block_ids)
        await adapter.offload(blocks, cache).wait()
        if await adapter.lookup(hashes) != tokens:
            raise EvaluationError("the sequence was not stored whole; see the log at --log-level debug")
        target = make_cache(codec.geometry, cache.num_blocks, cache.block_size, codec.device)
        times = []
        first_stop = codec.layer_groups[0].stop
        uncounted = 1 if codec.device.type == "cuda" else 0
        for _ in range(uncounted + repetitions):
            start = time.perf_counter()
            handle = adapter.onboard(blocks, target)
            await handle.layer(0)
            first_layer = time.perf_counter() - start
            await handle.layer(first_stop - 1)
            first_group = time.perf_counter() - start
            await handle.wait()
            times.append((time.perf_counter() - start, first_group, first_layer))
        whole_s, group_s, layer_s = (
            statistics.median(column) for column in zip(*times[uncounted:], strict=True)
        )
    return Onboard("host" if folder is None else "disk", whole_s, group_s, layer_s, group_s / whole_s)
