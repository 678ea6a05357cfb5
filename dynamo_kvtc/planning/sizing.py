"""The arithmetic: from a model, GPUs, memory and a ratio to tiers, memory, volumes and tokens held."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dynamo_kvtc.calibration.settings import default_layer_groups
from dynamo_kvtc.codec.geometry import KvGeometry
from dynamo_kvtc.config.models import PipelineConfig, PolicyConfig, TransferConfig
from dynamo_kvtc.config.units import format_size
from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.planning.models import ModelShape
from dynamo_kvtc.policy import OffloadPolicy
from dynamo_kvtc.tiers.disk_format import record_bytes

__all__ = ["SHARED_BYTES", "Connector", "Held", "Mode", "Plan", "PlanRequest", "plan"]

Connector = Literal["kvtc", "offloading", "kvbm"]
Mode = Literal["aggregated", "disaggregated"]

_GIB = 1 << 30
_MIB = 1 << 20

#: Host memory of the engine's processes without tiers: one scheduler, one worker per GPU.
_ENGINE_BYTES = 8 * _GIB
_ENGINE_BYTES_PER_GPU = 4 * _GIB

#: What Dynamo's operator mounts at /dev/shm by default, and what vLLM needs there beside its own pool.
SHARED_BYTES = 8 * _GIB

#: vLLM keeps its raw CPU pool in /dev/shm and needs about a fifth more there than it was given.
_POOL_FACTOR = 1.2

#: Share of the memory for tiers that a host's own raw pool gets, where it has one.
_POOL_SHARE = 0.25

#: Share of a disk volume that stays free: file systems slow down, and fail, when they are full.
_DISK_RESERVE = 0.05

#: Memory of an index entry in all tiers together; "some hundred bytes" in docs/operations.md.
_INDEX_BYTES = 512

#: GPU memory for activations and graphs, on each GPU.
_ACTIVATION_BYTES = 4 * _GIB

#: Most of the GPU memory that weights may take where the number of GPUs is not given.
_WEIGHT_SHARE = 0.75

#: Bytes of a basis entry in memory: float32, and again in the compute dtype (float32 at most).
_BASIS_ENTRY_BYTES = 8


@dataclass(frozen=True)
class PlanRequest:
    """What is to be sized.

    Attributes
    ----------
    model : ModelShape
        The model to serve.
    gpus : int
        GPUs in all.
    ratio : float
        Ratio of real streams that `dynamo-kvtc evaluate` measured or that is aimed at.
    profile : str
        codec.profile.
    connector, mode : Connector, Mode
        How the tier is reached, and whether prefill and decode are apart; tiers sit on prefill workers then.
    gpu_memory : int
        Bytes of one GPU.
    gpu_share : float
        vLLM's ``--gpu-memory-utilization``.
    gpus_per_worker : int, optional
        Tensor parallel size; by default the least power of two whose GPUs hold the weights in three quarters.
    memory, disk : int
        Bytes of memory, and of the disk volume, that one worker with tiers may have. No disk tier if 0.
    sequence_tokens : int
        A typical sequence, for the ratio that remains beside the recent window.
    prefill_share : float
        Share of the workers that prefill, where prefill and decode are apart.
    block_size : int
        Tokens of the engine's blocks.
    """

    model: ModelShape
    gpus: int
    ratio: float
    profile: str = "rd"
    connector: Connector = "kvtc"
    mode: Mode = "aggregated"
    gpu_memory: int = 80 * _GIB
    gpu_share: float = 0.9
    gpus_per_worker: int | None = None
    memory: int = 128 * _GIB
    disk: int = 1024 * _GIB
    sequence_tokens: int = 8192
    prefill_share: float = 0.5
    block_size: int = 16


@dataclass(frozen=True)
class Held:
    """Tokens that fit into one place, of one worker.

    Attributes
    ----------
    capacity : int
        Bytes.
    raw, compressed : int
        Tokens it would hold as they are, and those it holds compressed; equal where nothing is compressed.
    """

    capacity: int
    raw: int
    compressed: int


@dataclass(frozen=True)
class Plan:
    """What `plan` found; bytes, tokens and workers.

    Attributes
    ----------
    request : PlanRequest
        What was asked.
    gpus_per_worker, workers, tier_workers : int
        Tensor parallel size, workers in all, and those of them that have tiers.
    token_bytes, stored_token_bytes : int, float
        One token's KV in the cache, and stored.
    tier_block_bytes : int
        One tier block as it is stored on disk, rounded up to its record.
    held : dict[str, Held]
        By place: ``gpu``, ``pool`` (the host's own raw pool), ``host``, ``disk``.
    memory : dict[str, int]
        What the container's memory is for, in bytes; its sum is the container's limit.
    artifact_bytes : int
        Most that bases can take in memory; the artifact says how much it is.
    shared_memory, volume, staging : int
        Bytes of /dev/shm, of the disk volume, of transfer.staging.
    effective_ratio : float
        Ratio over a sequence of `PlanRequest.sequence_tokens`, recent window and sinks counted.
    notes : tuple[str, ...]
        What the reader should know before using the plan.
    """

    request: PlanRequest
    gpus_per_worker: int
    workers: int
    tier_workers: int
    token_bytes: int
    stored_token_bytes: float
    tier_block_bytes: int
    held: dict[str, Held]
    memory: dict[str, int]
    artifact_bytes: int
    shared_memory: int
    volume: int
    staging: int
    effective_ratio: float
    notes: tuple[str, ...] = field(default=())

    @property
    def memory_limit(self) -> int:
        """Memory limit of one worker's container, a whole number of GiB."""
        return _up(sum(self.memory.values()))

    @property
    def fleet_tokens(self) -> tuple[int, int]:
        """Different tokens that the tiers of all workers hold: raw, and compressed.

        A block is written to all tiers of its worker, so the largest tier says how many there are.
        """
        tiers = [self.held[place] for place in ("host", "disk") if place in self.held]
        return (
            self.tier_workers * max(tier.raw for tier in tiers),
            self.tier_workers * max(tier.compressed for tier in tiers),
        )


def plan(request: PlanRequest) -> Plan:
    """Size tiers, memory and volumes.

    Raises
    ------
    ConfigError
        If the GPUs cannot hold the model, or the memory leaves nothing for a tier.
    """
    _check(request)
    geometry = request.model.geometry
    per_worker = request.gpus_per_worker or _gpus_per_worker(request)
    if per_worker > 1:
        raise ConfigError(
            f"{request.model.name} would need {per_worker} GPUs of {format_size(request.gpu_memory)} a "
            "worker; workers have one, for an artifact covers all KV heads. Plan with larger GPUs "
            "(--gpu-memory), or with --gpus-per-worker 1 if the weights leave enough for the cache"
        )
    workers = request.gpus // per_worker
    prefill, decode = _split_workers(request, workers)
    policy = _policy()
    policy.check_block_size(request.block_size)
    raw_block = geometry.token_bytes * policy.tier_block_tokens
    stored_block = record_bytes(int(geometry.token_bytes_16bit * policy.tier_block_tokens / request.ratio))
    if request.profile == "raw":
        stored_block = record_bytes(raw_block)
    volume = _down(request.disk)
    disk = _down(int((1 - _DISK_RESERVE) * volume))
    staging = max(TransferConfig().staging, _up(4 * raw_block, 64 * _MIB))
    artifact = 0 if request.profile == "raw" else _most_artifact_bytes(request.profile, geometry)
    fixed = {
        "engine": _ENGINE_BYTES + _ENGINE_BYTES_PER_GPU * per_worker,
        "artifact": artifact,
        "staging": staging,
        "batches": 2 * PipelineConfig().offload_batch * raw_block,
        "index": _up((request.memory + disk) // stored_block * _INDEX_BYTES, _MIB),
    }
    left = request.memory - sum(fixed.values()) - SHARED_BYTES
    pool = 0 if request.connector == "kvtc" else _down(int(_POOL_SHARE * left))
    in_shared = _up(int(_POOL_FACTOR * pool)) if request.connector == "offloading" else 0
    host = _down(left - (in_shared or pool))
    if host < _GIB:
        needed = _up(request.memory - left + _GIB + (_GIB if pool else 0))
        raise ConfigError(
            f"{format_size(request.memory)} of memory leaves nothing for a host tier: the engine, the "
            f"artifact and /dev/shm take up to {format_size(_up(request.memory - left))}; give a worker "
            f"{format_size(needed)} or more"
        )
    shared = SHARED_BYTES + in_shared
    memory = {**fixed, "shared memory": shared, "host tier": host}
    if pool and not in_shared:
        memory["raw pool"] = pool
    per_token = stored_block / policy.tier_block_tokens
    engine_gpu = request.gpu_memory * request.gpu_share - _ACTIVATION_BYTES
    usable = int(engine_gpu * per_worker) - request.model.weight_bytes
    if usable < geometry.token_bytes * request.block_size:
        raise ConfigError(
            f"the weights of {request.model.name} leave no room for its cache on a GPU of "
            f"{format_size(request.gpu_memory)}: plan with larger GPUs (--gpu-memory)"
        )
    held = {"gpu": _held(usable, geometry, None)}
    if pool:
        held["pool"] = _held(pool, geometry, None)
    held["host"] = _held(host, geometry, per_token)
    if disk:
        held["disk"] = _held(disk, geometry, per_token)
    return Plan(
        request=request,
        gpus_per_worker=per_worker,
        workers=workers,
        tier_workers=prefill or workers,
        token_bytes=geometry.token_bytes,
        stored_token_bytes=per_token,
        tier_block_bytes=stored_block,
        held=held,
        memory=memory,
        artifact_bytes=artifact,
        shared_memory=shared,
        volume=volume,
        staging=staging,
        effective_ratio=policy.effective_ratio(request.sequence_tokens, request.ratio),
        notes=_notes(request, per_worker, workers, decode, policy),
    )


def _check(request: PlanRequest) -> None:
    if request.ratio < 1:
        raise ConfigError(f"a ratio is 1 or more, not {request.ratio:g}")
    if request.gpus < 1 or request.sequence_tokens < 1:
        raise ConfigError("GPUs and tokens are 1 or more")
    if not 0 < request.gpu_share <= 1 or not 0 < request.prefill_share < 1:
        raise ConfigError("shares lie between 0 and 1")
    if request.profile == "raw" and request.ratio != 1:
        raise ConfigError("profile raw stores blocks as they are: its ratio is 1")


def _gpus_per_worker(request: PlanRequest) -> int:
    count = 1
    while request.model.weight_bytes > _WEIGHT_SHARE * request.gpu_share * request.gpu_memory * count:
        count *= 2
        if count > request.gpus:
            raise ConfigError(
                f"{request.model.name} has about {request.model.weight_bytes / 1e9:.0f} GB of weights; "
                f"{request.gpus} GPUs of {format_size(request.gpu_memory)} leave too little for its KV cache"
            )
    return count


def _split_workers(request: PlanRequest, workers: int) -> tuple[int, int]:
    """Return how many workers prefill and decode; (0, 0) where each does both."""
    if workers < 1:
        raise ConfigError(f"{request.gpus} GPUs do not make one worker of {request.gpus_per_worker}")
    if request.mode == "aggregated":
        return 0, 0
    if workers < 2:
        raise ConfigError(
            f"prefill and decode apart need two workers; {request.gpus} GPUs make one: use aggregated "
            "serving or more GPUs"
        )
    prefill = min(workers - 1, max(1, round(request.prefill_share * workers)))
    return prefill, workers - prefill


def _policy() -> OffloadPolicy:
    defaults = PolicyConfig()
    return OffloadPolicy(
        tier_block_tokens=defaults.tier_block_tokens,
        sink_tokens=defaults.sink_tokens,
        recent_window=defaults.recent_window,
        minimum_tokens=defaults.minimum_tokens,
    )


def _most_artifact_bytes(profile: str, geometry: KvGeometry) -> int:
    """Bound the memory of bases and metrics: every component kept, in the default layer groups."""
    total = 0
    for group in default_layer_groups(profile, geometry):
        row = group.count * geometry.layer_size
        rank = row if profile == "rd" else min(row, 10_000)
        total += 2 * rank * row * _BASIS_ENTRY_BYTES
    return _up(total, _MIB)


def _held(capacity: int, geometry: KvGeometry, per_token: float | None) -> Held:
    raw = max(0, capacity) // geometry.token_bytes
    return Held(max(0, capacity), raw, raw if per_token is None else int(capacity / per_token))


def _notes(
    request: PlanRequest, per_worker: int, workers: int, decode: int, policy: OffloadPolicy
) -> tuple[str, ...]:
    notes = [
        f"the ratio {request.ratio:g} is what you gave: measure yours with `dynamo-kvtc evaluate`",
        "the artifact's memory is a bound; `dynamo-kvtc inspect` shows what a calibrated one takes",
    ]
    if unused := request.gpus - workers * per_worker:
        notes.append(f"{unused} GPUs are left over")
    if decode:
        notes.append(
            f"tiers sit on the {workers - decode} prefill workers; decode takes KV from them over NIXL"
        )
    if request.sequence_tokens < policy.minimum_tokens:
        notes.append(
            f"sequences of {request.sequence_tokens} tokens are shorter than policy.minimum_tokens "
            f"({policy.minimum_tokens}): they are not offloaded at all"
        )
    if request.sequence_tokens > request.model.context:
        notes.append(f"the model's longest sequence is {request.model.context} tokens")
    return tuple(notes)


def _up(nbytes: int, unit: int = _GIB) -> int:
    return -(-nbytes // unit) * unit


def _down(nbytes: int, unit: int = _GIB) -> int:
    return max(0, nbytes) // unit * unit
