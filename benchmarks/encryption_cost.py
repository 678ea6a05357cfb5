"""What encryption at rest costs: onboard and offload of the same text, and the tier alone.

A host tier, whose own work is a copy, so that the cost shows at its largest. Variants alternate.
"""

from __future__ import annotations

import asyncio
import secrets
import statistics
import time
from functools import partial

from common import BLOCK_SIZE, Subject, interleave, load_subject, parse_arguments, publish

from dynamo_kvtc.codec.base import KvCodec
from dynamo_kvtc.codec.open import open_codec
from dynamo_kvtc.pipeline.adapter import TierAdapter
from dynamo_kvtc.policy import OffloadPolicy
from dynamo_kvtc.tiers import HostTier, ReadRequest, Tier, TierStack
from dynamo_kvtc.tiers.encrypted import EncryptedTier
from dynamo_kvtc.tiers.encryption_keys import KeyRing, MasterKey
from dynamo_kvtc.transfer import MemorySpan, StagingPool, TransferAgent

_BYTES = 256 << 20
_OBJECTS, _OBJECT_BYTES = 16, 1 << 20
_KEYS = [secrets.token_bytes(32) for _ in range(_OBJECTS)]


async def open_tier(agent: TransferAgent, *, encrypted: bool) -> Tier:
    tier = await HostTier.open(agent, _BYTES)
    if not encrypted:
        return tier
    ring = KeyRing(MasterKey("benchmark", secrets.token_bytes(32)))
    return EncryptedTier(tier, ring, await StagingPool.create(agent, _BYTES))


async def open_pipeline(
    subject: Subject, codec: KvCodec, policy: OffloadPolicy, *, encrypted: bool
) -> TierAdapter:
    agent = await TransferAgent.create()
    staging = await StagingPool.create(agent, _BYTES)
    tier = await open_tier(agent, encrypted=encrypted)
    artifact_id = subject.artifact.parameters.artifact_id
    return TierAdapter(codec, artifact_id, agent, staging, TierStack([tier]), policy, BLOCK_SIZE)


async def offload(subject: Subject, adapter: TierAdapter) -> float:
    await adapter.reset()
    start = time.perf_counter()
    await subject.offload(adapter)
    return time.perf_counter() - start


async def put(tier: Tier, span: MemorySpan) -> float:
    await tier.clear()
    start = time.perf_counter()
    for key in _KEYS:
        await tier.put(key, span, timeout_s=30.0)
    return time.perf_counter() - start


async def get(tier: Tier, span: MemorySpan) -> float:
    start = time.perf_counter()
    for key in _KEYS:
        await tier.get([ReadRequest(key, 0, span)], timeout_s=30.0)
    return time.perf_counter() - start


async def main() -> None:
    arguments = parse_arguments(__doc__)
    subject = load_subject(arguments)
    policy = OffloadPolicy(recent_window=0)
    codec = open_codec(subject.artifact.parameters, ratio=arguments.ratio)
    stored = sum(len(stream) for stream in codec.encode(subject.gather(policy)))
    async with await TransferAgent.create() as agent:
        span = (await agent.allocate(_OBJECT_BYTES)).span()
        span.view[:] = secrets.token_bytes(_OBJECT_BYTES)
        variants = {}
        for name, encrypted in (("plain", False), ("encrypted", True)):
            tier = await open_tier(agent, encrypted=encrypted)
            adapter = await open_pipeline(subject, codec, policy, encrypted=encrypted)
            variants[f"offload, {name}"] = partial(offload, subject, adapter)
            variants[f"onboard, {name}"] = partial(subject.onboard, adapter)
            variants[f"tier put, {name}"] = partial(put, tier, span)
            variants[f"tier get, {name}"] = partial(get, tier, span)
        seconds = await interleave(variants, arguments.repetitions)
    median = {name: statistics.median(runs) for name, runs in seconds.items()}
    moved = _OBJECTS * _OBJECT_BYTES
    publish(
        arguments,
        "Cost of encryption at rest",
        seconds,
        {
            f"{what}, encrypted / plain": (median[f"{what}, encrypted"] / median[f"{what}, plain"], "-")
            for what in ("offload", "onboard", "tier put", "tier get")
        },
        {
            "stored_bytes": stored,
            "tier_bytes": moved,
            "seal_and_store_bytes_per_s": moved / median["tier put, encrypted"],
            "read_and_open_bytes_per_s": moved / median["tier get, encrypted"],
            "profile": subject.artifact.manifest.profile,
        },
    )


if __name__ == "__main__":
    asyncio.run(main())
