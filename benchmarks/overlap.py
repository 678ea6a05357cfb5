"""Overlap of transfer and decode: a disk throttled to the speed of decoding.

Overlapped onboard against the longer of its two halves, each measured alone: reading the same objects
with nothing to decode, and decoding and scattering the same streams out of memory.

    python benchmarks/overlap.py --artifact demo-output/artifact
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Sequence

import torch
from common import BLOCK_SIZE, Subject, interleave, load_subject, parse_arguments, publish

from dynamo_kvtc.codec.base import KvCodec
from dynamo_kvtc.codec.open import open_codec
from dynamo_kvtc.pipeline.adapter import TierAdapter
from dynamo_kvtc.policy import OffloadPolicy
from dynamo_kvtc.testing import ThrottledTier
from dynamo_kvtc.tiers.base import ReadRequest
from dynamo_kvtc.tiers.disk import DiskTier
from dynamo_kvtc.tiers.stack import TierStack
from dynamo_kvtc.transfer.agent import TransferAgent
from dynamo_kvtc.transfer.memory import MemoryRegion
from dynamo_kvtc.transfer.staging import StagingPool

_STAGING_BYTES = 64 << 20
_TIMEOUT_S = 60.0


@torch.inference_mode()
def decode(subject: Subject, codec: KvCodec, streams: Sequence[bytes]) -> float:
    """Decode streams and scatter every layer into fresh blocks, as onboarding does; return the seconds."""
    engine = subject.session.engine
    session = engine.session(subject.token_ids)
    block_ids = session.reserve(len(subject.token_ids)).block_ids
    start = time.perf_counter()
    headers = [codec.read_header(stream) for stream in streams]
    for group, layers in enumerate(codec.layer_groups):
        parts = []
        for header, stream in zip(headers, streams, strict=True):
            first, stop = header.group_span(group)
            parts.append(codec.open_group(header, group, memoryview(stream)[first:stop]))
        for layer in range(layers.first, layers.stop):
            engine.cache.scatter_layer(layer, block_ids, *codec.decode_layer(parts, layer))
    seconds = time.perf_counter() - start
    session.evict()
    return seconds


async def decode_alone(subject: Subject, codec: KvCodec, streams: Sequence[bytes]) -> float:
    """Decode in a thread, as onboarding does."""
    return await asyncio.to_thread(decode, subject, codec, streams)


async def transfer(subject: Subject, adapter: TierAdapter, memory: MemoryRegion) -> float:
    """Read all objects of the text in one batch; return the seconds it took."""
    keys = adapter.keys(subject.session.hashes())
    reads, offset = [], 0
    for key in keys:
        size = adapter.tiers.size_of(key) or 0
        reads.append(ReadRequest(key, 0, memory.span(offset, size)))
        offset += size
    start = time.perf_counter()
    await adapter.tiers.get(reads, timeout_s=_TIMEOUT_S)
    return time.perf_counter() - start


async def open_throttled(
    subject: Subject,
    codec: KvCodec,
    policy: OffloadPolicy,
    agent: TransferAgent,
    folder: str,
    bytes_per_s: float,
) -> TierAdapter:
    tier = ThrottledTier(await DiskTier.open(agent, folder, 1 << 30), bytes_per_s)
    staging = await StagingPool.create(agent, _STAGING_BYTES)
    artifact_id = subject.artifact.parameters.artifact_id
    return TierAdapter(codec, artifact_id, agent, staging, TierStack([tier]), policy, BLOCK_SIZE)


async def main() -> None:
    arguments = parse_arguments(__doc__)
    subject = load_subject(arguments)
    policy = OffloadPolicy(recent_window=0)
    codec = open_codec(subject.artifact.parameters, ratio=arguments.ratio)
    streams = codec.encode(subject.gather(policy))
    stored = sum(len(stream) for stream in streams)
    trials = [await decode_alone(subject, codec, streams) for _ in range(arguments.repetitions + 1)]
    bytes_per_s = stored / statistics.median(trials[1:])

    agent = await TransferAgent.create()
    memory = await agent.allocate(stored)
    with tempfile.TemporaryDirectory(prefix="kvtc-bench-") as folder:
        async with await open_throttled(subject, codec, policy, agent, folder, bytes_per_s) as adapter:
            await subject.offload(adapter)
            seconds = await interleave(
                {
                    "transfer alone": lambda: transfer(subject, adapter, memory),
                    "decode alone": lambda: decode_alone(subject, codec, streams),
                    "onboard": lambda: subject.onboard(adapter),
                },
                arguments.repetitions,
            )
    transfer_s, decode_s, onboard_s = (statistics.median(runs) for runs in seconds.values())
    publish(
        arguments,
        "Overlap of transfer and decode",
        seconds,
        {
            "onboard / longer half": (onboard_s / max(transfer_s, decode_s), "at most 1.25"),
            "both halves / onboard": ((transfer_s + decode_s) / onboard_s, "-"),
        },
        {
            "stored_bytes": stored,
            "throttled_bytes_per_s": bytes_per_s,
            "profile": subject.artifact.manifest.profile,
            "dtype": subject.loaded.geometry.dtype,
            "layer_groups": len(codec.layer_groups),
            "tier_blocks": len(streams),
        },
    )


if __name__ == "__main__":
    asyncio.run(main())
