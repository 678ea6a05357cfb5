"""From a configuration to a running `TierAdapter`."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from contextlib import AsyncExitStack
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from dynamo_kvtc.calibration.artifact import Artifact, load_artifact
from dynamo_kvtc.codec.base import KvCodec
from dynamo_kvtc.codec.entropy import RansCoder
from dynamo_kvtc.codec.geometry import KvGeometry
from dynamo_kvtc.codec.mixed import MixedCodec
from dynamo_kvtc.codec.open import open_codec, open_gpu_codec
from dynamo_kvtc.codec.paged_codec import PagedCodec
from dynamo_kvtc.codec.parameters import ARTIFACT_ID_BYTES
from dynamo_kvtc.codec.raw import RawCodec
from dynamo_kvtc.codec.rope import RopeParameters
from dynamo_kvtc.codec.transform_codec import TransformCodec
from dynamo_kvtc.config import (
    Config,
    DiskTierConfig,
    EncryptionConfig,
    HostTierConfig,
    ObjectTierConfig,
    TierConfig,
)
from dynamo_kvtc.errors import (
    ArtifactMismatchError,
    ConfigError,
    GpuUnavailableError,
    LayoutError,
    MissingDependencyError,
)
from dynamo_kvtc.observability import configure_logging
from dynamo_kvtc.observability.tracing import prepare_tracing
from dynamo_kvtc.pipeline.adapter import TierAdapter
from dynamo_kvtc.pipeline.device_staging import landing_bytes, open_device_staging
from dynamo_kvtc.pipeline.encoders import Encoder, Encoders
from dynamo_kvtc.pipeline.expose import expose
from dynamo_kvtc.pipeline.onboard import OnboardSettings
from dynamo_kvtc.policy import RAW, CostPolicy, CostSettings, OffloadPolicy, Speeds
from dynamo_kvtc.policy.admission import Admission
from dynamo_kvtc.policy.guard import GuardSettings
from dynamo_kvtc.tiers.access import check_private
from dynamo_kvtc.tiers.base import Gate, Tier
from dynamo_kvtc.tiers.breaker_tier import BreakerTier
from dynamo_kvtc.tiers.disk import DiskSettings, DiskTier
from dynamo_kvtc.tiers.encrypted import EncryptedTier
from dynamo_kvtc.tiers.encryption_keys import KeyRing, read_key
from dynamo_kvtc.tiers.host import HostTier
from dynamo_kvtc.tiers.object import ObjectSettings, ObjectTier
from dynamo_kvtc.tiers.object_client import BucketPlace
from dynamo_kvtc.tiers.shared import SharedDiskTier
from dynamo_kvtc.tiers.stack import TierStack
from dynamo_kvtc.tiers.write_behind import WriteBehind
from dynamo_kvtc.transfer.agent import TransferAgent
from dynamo_kvtc.transfer.settings import AgentSettings
from dynamo_kvtc.transfer.staging import StagingPool

if TYPE_CHECKING:
    from dynamo_kvtc.codec.gpu.device import GpuDevice

__all__ = ["offload_policy", "open_adapter"]

_log = logging.getLogger(__name__)


#: More threads than this are not taken by themselves: the engine needs cores too.
_MOST_DECODE_THREADS = 8


async def open_adapter(
    config: Config,
    geometry: KvGeometry,
    block_size: int,
    rope: RopeParameters | None = None,
    *,
    device: torch.device | GpuDevice | None = None,
    wrap_tier: Callable[[Tier], Tier] = lambda tier: tier,
) -> TierAdapter:
    """Open tiers, transfer agent and codec as configured.

    Parameters
    ----------
    geometry, block_size : KvGeometry, int
        The engine's cache.
    rope : RopeParameters, optional
        How the engine's model rotates keys; checked against the artifact when given.
    device : torch.device or GpuDevice, optional
        Where the engine's cache lies (`PagedKvCache.device`), or a device that is open; by default host
        memory. ``codec.device`` says whether it is used.
    wrap_tier : Callable[[Tier], Tier]
        Puts something around each tier, for tests and measurements (`dynamo_kvtc.testing`).

    Raises
    ------
    ArtifactError
        If the artifact cannot be used, is of another profile, was calibrated for another model, or has no
        plan for the ratio or divergence that is asked for.
    ConfigError
        If settings contradict the engine.
    GpuUnavailableError
        If the codec must work on a GPU and cannot.
    TierError, TransferError, MissingDependencyError
        If a tier or NIXL cannot be opened.
    """
    configure_logging(config.observability.log_level, replace=False)
    cores = len(os.sched_getaffinity(0))
    policy = offload_policy(config)
    policy.check_block_size(block_size)
    await asyncio.to_thread(prepare_tracing)
    codec, encoders, artifact_id = await asyncio.to_thread(_codecs, config, geometry, rope)
    device_codec = await asyncio.to_thread(_device_codec, config, codec, device)
    async with AsyncExitStack() as opened:
        agent = await opened.enter_async_context(
            await TransferAgent.create(
                AgentSettings(
                    io_uring=config.transfer.io_uring,
                    gds=config.transfer.gds,
                    max_descriptors=config.transfer.max_descriptors,
                    interface=config.transfer.interface,
                )
            )
        )
        on_cuda = device_codec is not None and device_codec.device.type == "cuda"
        staging = await StagingPool.create(agent, config.transfer.staging, pinned=on_cuda)
        opened.push_async_callback(staging.close)
        tiers: list[Tier] = []
        for index, tier_config in enumerate(config.tiers):
            if isinstance(tier_config, DiskTierConfig):
                await asyncio.to_thread(check_private, tier_config.path, config.security.open_folders)
            tier = await _tier(tier_config, agent, name=f"{tier_config.kind}{index}")
            opened.push_async_callback(tier.close)
            if tier_config.encryption is not None:
                tier = await _encrypted(tier, tier_config.encryption, agent, config.transfer.staging)
                opened.push_async_callback(tier.close)
            tier = wrap_tier(tier)
            if not isinstance(tier_config, ObjectTierConfig):  # those have a breaker for each request
                tier = BreakerTier(tier, staging)
            tiers.append(tier)
        behind = {}
        for tier, tier_config in list(zip(tiers, config.tiers, strict=True))[1:]:
            if isinstance(tier_config, ObjectTierConfig) and tier_config.upload_queue:
                memory = await StagingPool.create(agent, tier_config.upload_queue)
                opened.push_async_callback(memory.close)
                behind[tier.name] = WriteBehind(tier, memory, at_once=tier_config.uploads)
        stack = TierStack(tiers, staging=staging, gates=_gates(config), behind=behind)
        adapter = TierAdapter(
            codec,
            artifact_id,
            agent,
            staging,
            stack,
            policy,
            block_size,
            salt=config.security.salt.encode(),
            onboard=OnboardSettings(
                timeout_s=config.pipeline.onboard_timeout,
                transfers_in_flight=config.pipeline.transfers_in_flight,
            ),
            queue_limit=config.pipeline.offload_queue,
            offload_batch=config.pipeline.offload_batch,
            stores_at_once=stores_at_once(config),
            decode_threads=config.pipeline.decode_threads or min(_MOST_DECODE_THREADS, cores),
            store_timeout_s=config.transfer.timeout,
            costs=_costs(config),
            encoders=encoders,
            device_codec=device_codec,
            device_staging=await open_device_staging(config, agent, device_codec, stack),
        )
        adapter.artifact = {"id": artifact_id.hex(), **_encoder(config)}
        if config.observability.metrics_port is not None:
            expose(adapter, config.observability.metrics_address, config.observability.metrics_port)
        opened.pop_all()  # the adapter closes them from here on
    return adapter


def stores_at_once(config: Config) -> int:
    """Return how many objects of a batch are stored side by side: one, unless offloads wait for a bucket."""
    waited_for = [
        tier.uploads
        for index, tier in enumerate(config.tiers)
        if isinstance(tier, ObjectTierConfig) and (not index or not tier.upload_queue)
    ]
    return max(waited_for, default=1)


def _encoder(config: Config) -> dict[str, Any]:
    """Say what blocks are encoded with, for people."""
    wanted = config.encoding
    if wanted.profile == "raw":
        return {"profile": "raw", "plan": None}
    plan = f"max_kl={wanted.max_kl:g}" if wanted.max_kl is not None else f"ratio={wanted.plan_ratio:g}"
    return {"profile": wanted.profile, "plan": plan}


def _gates(config: Config) -> dict[str, Gate]:
    """Return what decides about writing into each disk tier that spares its disk."""
    return {
        f"disk{index}": Admission(tier.admit_after, tier.daily_writes)
        for index, tier in enumerate(config.tiers)
        if isinstance(tier, DiskTierConfig) and (tier.admit_after or tier.daily_writes)
    }


def _costs(config: Config) -> CostPolicy:
    settings = CostSettings(enabled=config.policy.decide == "measured", hysteresis=config.policy.hysteresis)
    return CostPolicy(Speeds(config.policy.prefill_tokens_per_s), settings)


def offload_policy(config: Config) -> OffloadPolicy:
    """Return the policy that a configuration asks for."""
    return OffloadPolicy(
        tier_block_tokens=config.policy.tier_block_tokens,
        sink_tokens=config.policy.sink_tokens,
        recent_window=config.policy.recent_window,
        minimum_tokens=config.policy.minimum_tokens,
    )


def _codecs(
    config: Config, geometry: KvGeometry, rope: RopeParameters | None
) -> tuple[KvCodec, Encoders, bytes]:
    """Return what decodes, what encodes, and the artifact's id."""
    wanted = config.encoding
    if wanted.profile == "raw":
        plain = RawCodec(geometry)
        return plain, Encoders.single(plain, RAW), bytes(ARTIFACT_ID_BYTES)
    if config.artifact is None:
        raise ConfigError(f"codec.profile {wanted.profile} needs an artifact")
    artifact = load_artifact(config.artifact)
    if (found := artifact.manifest.profile) != wanted.profile:
        raise ArtifactMismatchError(
            f"the artifact {config.artifact} is of profile {found}, codec.profile is {wanted.profile}: set "
            f"codec.profile to {found}, or calibrate with `dynamo-kvtc calibrate --profile {wanted.profile}`"
        )
    artifact.check_model(geometry, rope or artifact.parameters.rope)
    codec = _open(config, artifact, ratio=wanted.plan_ratio, max_kl=wanted.max_kl)
    codec.warm_up()
    artifact_id = artifact.parameters.artifact_id
    # Raw streams are read whatever the policy is: an earlier one may have stored some.
    raw = RawCodec(geometry, artifact_id, layer_groups=codec.layer_groups)
    return MixedCodec(codec, raw), _encoders(config, codec, raw, artifact), artifact_id


def _encoders(config: Config, codec: TransformCodec, raw: RawCodec, artifact: Artifact) -> Encoders:
    """Return what may be encoded with: the artifact's plans up to the coarsest that is allowed, and raw."""
    ratios, profile = artifact.parameters.ratios, config.encoding.profile
    stated = {one.plan_id: fmean([*one.keys, *one.values]) for one in artifact.manifest.expected_error}
    own = codec.encoding_plan
    most = max(ratios[own], config.codec.max_ratio or 0.0)
    names = _encoder(config)
    plans = []
    for plan_id in sorted((one for one in ratios if ratios[one] <= most), key=lambda one: -ratios[one]):
        ratio = ratios[plan_id]
        if plan_id == own:
            plans.append(Encoder(f"{profile} {names['plan']}", codec, ratio, stated[own]))
            continue
        # The quality of the configured plan is what was chosen; gentler ones are held against it, too.
        error = stated.get(plan_id, stated[own]) if ratio > ratios[own] else stated[own]
        opened = _open(config, artifact, ratio=ratio)
        plans.append(Encoder(f"{profile} ratio={ratio:g}", opened, ratio, error))
    takes, staging = raw.max_stream_bytes(config.policy.tier_block_tokens, 0), config.transfer.staging
    no_raw = "policy.raw is never" if config.policy.raw == "never" else ""
    if not no_raw and takes > staging:
        no_raw = f"a raw tier block takes {takes} bytes, transfer.staging has {staging}"
    return Encoders(
        plans,
        next(index for index, plan in enumerate(plans) if plan.codec is codec),
        raw=None if no_raw else Encoder(RAW, raw),
        no_raw=no_raw,
        raw_by_cost=config.policy.raw == "by_cost",
        guard=GuardSettings(config.policy.guard.share, config.policy.guard.tolerance),
    )


def _open(
    config: Config, artifact: Artifact, *, ratio: float | None, max_kl: float | None = None
) -> TransformCodec:
    wanted = config.encoding
    return open_codec(
        artifact.parameters,
        ratio=ratio,
        max_kl=max_kl,
        sink_bits=wanted.sink_bits,
        compute_dtype=wanted.compute_dtype,
        coder=RansCoder() if wanted.entropy == "rans" else None,
        threads=wanted.threads or len(os.sched_getaffinity(0)),
    )


def _device_codec(
    config: Config, codec: KvCodec, device: torch.device | GpuDevice | None
) -> PagedCodec | None:
    """Open the codec of the engine's GPU as `codec.device` says; None where the CPU's serves."""
    wanted = config.codec
    if isinstance(codec, MixedCodec):
        codec = codec.coded
    if wanted.device == "cpu" or not isinstance(codec, TransformCodec):
        return None
    if device is None or (isinstance(device, torch.device) and device.type != "cuda"):
        if wanted.device == "cuda":
            raise ConfigError(
                "codec.device is cuda, but the engine's cache lies in host memory: set it to auto or cpu"
            )
        return None
    try:
        opened = open_gpu_codec(
            codec,
            device,
            block_tokens=config.policy.tier_block_tokens,
            staging_bytes=wanted.gpu.memory,
            landing_bytes=landing_bytes(config),
            sm_share=wanted.gpu.sm_share,
            priority=wanted.gpu.priority,
        )
    except (GpuUnavailableError, MissingDependencyError, LayoutError) as error:
        if wanted.device == "cuda":
            raise
        _log.warning("the CPU encodes and decodes the GPU's cache, which is slow: %s", error)
        return None
    _log.info("tier blocks are encoded and decoded on %s", opened.device)
    return opened


async def _tier(config: TierConfig, agent: TransferAgent, *, name: str) -> Tier:
    if isinstance(config, HostTierConfig):
        return await HostTier.open(agent, config.capacity, name=name)
    if isinstance(config, ObjectTierConfig):
        return await _object_tier(config, name)
    settings = DiskSettings(segment_bytes=config.segment_size, durability=config.durability)
    kind = SharedDiskTier if config.shared else DiskTier
    return await kind.open(agent, config.path, config.capacity, settings=settings, name=name)


async def _encrypted(
    inner: Tier, encryption: EncryptionConfig, agent: TransferAgent, staging_bytes: int
) -> Tier:
    keys = [await asyncio.to_thread(read_key, key.id, key.file) for key in encryption.keys]
    # As much as the pool that plain objects pass through, and what sealing adds to it.
    staging = await StagingPool.create(agent, staging_bytes + staging_bytes // 256 + 1024**2)
    return EncryptedTier(inner, KeyRing(*keys), staging)


async def _object_tier(config: ObjectTierConfig, name: str) -> Tier:
    place = BucketPlace(
        config.bucket, config.prefix, config.endpoint, config.region, virtual_hosted=config.virtual_hosted
    )
    settings = ObjectSettings(
        timeout_s=config.request_timeout,
        lookup_wait_s=config.lookup_wait,
        miss_ttl_s=config.miss_ttl,
        max_requests=config.max_requests,
        transport=config.transport,
    )
    return await ObjectTier.open(place, config.capacity, settings=settings, name=name)
