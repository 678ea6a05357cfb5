"""A whole pipeline on real tiers and real NIXL, around a made-up paged cache."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from dynamo_kvtc.codec.base import KvCodec
from dynamo_kvtc.codec.geometry import KvGeometry
from dynamo_kvtc.codec.kvtc import KvtcCodec
from dynamo_kvtc.codec.paged_codec import PagedCodec
from dynamo_kvtc.codec.raw import RawCodec
from dynamo_kvtc.pipeline.adapter import TierAdapter
from dynamo_kvtc.pipeline.blocks import SequenceBlocks
from dynamo_kvtc.pipeline.device_staging import DeviceStaging
from dynamo_kvtc.pipeline.encoders import Encoders
from dynamo_kvtc.pipeline.onboard import OnboardSettings
from dynamo_kvtc.pipeline.paged import PagedKvCache
from dynamo_kvtc.policy import OffloadPolicy
from dynamo_kvtc.tiers.base import Gate, Tier
from dynamo_kvtc.tiers.disk import DiskTier
from dynamo_kvtc.tiers.host import HostTier
from dynamo_kvtc.tiers.stack import TierStack
from dynamo_kvtc.transfer.agent import TransferAgent
from dynamo_kvtc.transfer.device_memory import DeviceRegion
from dynamo_kvtc.transfer.staging import StagingPool

sys.path.insert(0, str(Path(__file__).parents[1] / "codec"))
from synthetic import make_block, make_parameters

GEOMETRY = KvGeometry(num_layers=4, num_kv_heads=2, head_size=16, dtype="bfloat16")
BLOCK_SIZE = 8
POLICY = OffloadPolicy(tier_block_tokens=32, sink_tokens=4, recent_window=0, minimum_tokens=0)
PARAMETERS = make_parameters(GEOMETRY, groups=2, ratios=(4.0,))

#: Wraps one of the rig's tiers; gets its name, "host" or "disk".
Wrap = Callable[[Tier, str], Tier]


@dataclass
class Rig:
    """A running adapter, with a cache of NaN to onboard into and one of KV to offload from."""

    adapter: TierAdapter
    agent: TransferAgent
    staging: StagingPool
    source: PagedKvCache
    destination: PagedKvCache
    device_staging: DeviceStaging | None = None

    def sequence(
        self, tokens: int, *, name: str = "a", salt: bytes = b"", first_id: int = 0
    ) -> SequenceBlocks:
        blocks = tokens // BLOCK_SIZE
        hashes = [f"{name}:{index}".encode() for index in range(blocks)]
        return SequenceBlocks(hashes, list(range(first_id, first_id + blocks)), salt)

    async def store(self, blocks: SequenceBlocks) -> None:
        result = await self.adapter.offload(blocks, self.source).wait()
        assert result.dropped == 0

    def expected(self, blocks: SequenceBlocks) -> tuple[torch.Tensor, torch.Tensor]:
        """What the codec alone makes of these blocks: the pipeline must deliver exactly this."""
        from dynamo_kvtc.codec.base import TierBlock

        keys, values = self.source.gather(blocks.block_ids)
        codec, policy = self.adapter.codec, self.adapter.policy
        step = policy.tier_block_tokens
        parts = []
        for first in range(0, keys.shape[0], step):
            block = TierBlock(
                keys[first : first + step], values[first : first + step], first, policy.sinks_in(first)
            )
            parts.append(codec.decode(codec.encode([block])[0]))
        return torch.cat([p.keys for p in parts]), torch.cat([p.values for p in parts])

    def assert_in_place(self, blocks: SequenceBlocks) -> None:
        keys, values = self.destination.gather(blocks.block_ids)
        expected_keys, expected_values = self.expected(blocks)
        assert torch.equal(keys, expected_keys)
        assert torch.equal(values, expected_values)


def make_codec(profile: str) -> KvCodec:
    return RawCodec(GEOMETRY) if profile == "raw" else KvtcCodec(PARAMETERS, ratio=4.0, threads=1)


def make_cache(num_blocks: int, *, filled: bool) -> PagedKvCache:
    shape = (2, num_blocks, BLOCK_SIZE, GEOMETRY.num_kv_heads, GEOMETRY.head_size)
    layers = [torch.full(shape, float("nan"), dtype=torch.bfloat16) for _ in range(GEOMETRY.num_layers)]
    if filled:
        block = make_block(PARAMETERS, num_blocks * BLOCK_SIZE)
        for layer, tensor in enumerate(layers):
            tensor[0] = block.keys[:, layer].reshape(shape[1:])
            tensor[1] = block.values[:, layer].reshape(shape[1:])
    return PagedKvCache.from_layers(layers, "2BNHD")


@asynccontextmanager
async def open_rig(
    folder: Path,
    *,
    profile: str = "kvtc",
    wrap: Wrap = lambda tier, _: tier,
    tiers: tuple[str, ...] = ("host", "disk"),
    host_bytes: int = 8 << 20,
    staging_bytes: int = 4 << 20,
    num_blocks: int = 64,
    queue_limit: int = 256,
    onboard: OnboardSettings | None = None,
    policy: OffloadPolicy = POLICY,
    codec: KvCodec | None = None,
    device_codec: PagedCodec | None = None,
    device_bytes: int = 0,
    encoders: Encoders | None = None,
    gates: Mapping[str, Gate] | None = None,
    store_timeout_s: float = 10.0,
    stores_at_once: int = 1,
    wrap_agent: Callable[[TransferAgent], TransferAgent] = lambda agent: agent,
) -> AsyncIterator[Rig]:
    async with AsyncExitStack() as opened:
        agent = await opened.enter_async_context(wrap_agent(await TransferAgent.create()))
        staging = await StagingPool.create(agent, staging_bytes)
        made: list[Tier] = []
        if "host" in tiers:
            made.append(wrap(await HostTier.open(agent, host_bytes), "host"))
        if "disk" in tiers:
            made.append(wrap(await DiskTier.open(agent, folder / "disk", 64 << 20), "disk"))
        stack = TierStack(made, staging=staging, gates=gates)
        device_staging = None
        if device_bytes and device_codec is not None:
            memory = torch.zeros(device_bytes, dtype=torch.uint8, device=device_codec.device)
            region = DeviceRegion(memory)
            await agent.register_memory(region)
            pool = StagingPool(agent, region, alignment=4096, max_waiters=0)
            device_staging = DeviceStaging(pool, stack, device_codec.profile)
        adapter = await opened.enter_async_context(
            TierAdapter(
                codec or make_codec(profile),
                PARAMETERS.artifact_id if profile == "kvtc" else bytes(32),
                agent,
                staging,
                stack,
                policy,
                BLOCK_SIZE,
                onboard=onboard,
                encoders=encoders,
                device_codec=device_codec,
                device_staging=device_staging,
                queue_limit=queue_limit,
                store_timeout_s=store_timeout_s,
                stores_at_once=stores_at_once,
            )
        )
        source, destination = make_cache(num_blocks, filled=True), make_cache(num_blocks, filled=False)
        yield Rig(adapter, agent, staging, source, destination, device_staging)
