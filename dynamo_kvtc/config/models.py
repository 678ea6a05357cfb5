"""The settings: every key with its type, bounds, default and meaning."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from dynamo_kvtc.config.sections import (
    ConfigPath,
    Divergence,
    Ratio,
    Section,
    check_one_plan,
    null_is_empty,
)
from dynamo_kvtc.config.tier_models import (
    DiskTierConfig,
    EncryptionConfig,
    HostTierConfig,
    ObjectTierConfig,
    TierCodecConfig,
    TierConfig,
    check_tiers,
)
from dynamo_kvtc.config.units import Duration, Size

__all__ = [
    "CodecConfig",
    "Config",
    "DiskTierConfig",
    "EncryptionConfig",
    "GpuConfig",
    "GuardConfig",
    "HostTierConfig",
    "ObjectTierConfig",
    "ObservabilityConfig",
    "PipelineConfig",
    "PolicyConfig",
    "SecurityConfig",
    "TierCodecConfig",
    "TierConfig",
    "TransferConfig",
    "json_schema",
]


#: Ratio that is encoded with if nothing is said, by profile.
_DEFAULT_RATIOS = {"rd": 20.0, "kvtc": 16.0}


class GpuConfig(Section):
    """How much of a GPU the codec takes beside the engine."""

    memory: Annotated[Size, Field(ge=1024**2)] = 1024**3
    """Bytes of device memory for what is in flight, taken at start; what does not fit waits. Bases, and what
    nvCOMP takes for itself, come on top."""

    sm_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Largest share of the multiprocessors that a kernel of the codec occupies; nvCOMP's are not bound."""

    priority: Literal["low", "high"] = "low"
    """Priority of the codec's stream. CUDA has none below that of an engine's stream: low is the same as it,
    high goes before it."""


class CodecConfig(Section):
    """How blocks are encoded at the boundary from G1 to the first tier."""

    profile: Literal["rd", "kvtc", "raw"] = "rd"
    """rd and kvtc compress with an artifact of theirs, kvtc by the published method; raw stores the cache's
    exact bytes."""

    ratio: Ratio | None = None
    """Ratio to encode with: of real streams with rd, before entropy coding with kvtc. The artifact must have
    a plan for it. If neither it nor max_kl is given, 20 with rd and 16 with kvtc. Unused by raw."""

    max_kl: Divergence | None = None
    """Instead of ratio, with rd: the artifact's plan with the highest ratio whose next-token KL (nats) was at
    most this in calibration."""

    max_ratio: Ratio | None = None
    """Up to this ratio the artifact's coarser plans may be taken as well, where they make onboarding faster
    by policy.hysteresis; at least ratio, not beside max_kl. null: the chosen plan only."""

    sink_bits: Literal[8, 16] = 8
    """Bits per element of sink tokens: 8 (fp8 with a scale per head) or 16 (the cache's own bytes)."""

    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the projections; auto is bfloat16 where the CPU multiplies it in hardware."""

    entropy: Literal["deflate", "rans"] = "deflate"
    """Entropy coder of what is written; both are read whatever this says. rans is made for GPUs, and on a CPU
    takes many times as long. Unused by raw."""

    threads: Annotated[int | None, Field(ge=1, le=1024)] = None
    """Threads that entropy-code chunks; by default one per core this process may use."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where blocks are encoded and decoded. auto: where the engine's cache lies, and on the CPU where the GPU
    cannot be used, which the log says. cuda: on the engine's GPU, or not at all. Streams are the same."""

    gpu: Annotated[GpuConfig, BeforeValidator(null_is_empty)] = GpuConfig()
    """What the codec takes of the GPU."""

    @model_validator(mode="after")
    def _one_plan(self) -> CodecConfig:
        check_one_plan(self.ratio, self.max_kl)
        return self

    @property
    def plan_ratio(self) -> float | None:
        """The ratio to encode with, or None where `max_kl` or nothing chooses the plan."""
        if self.ratio is not None or self.max_kl is not None:
            return self.ratio
        return _DEFAULT_RATIOS.get(self.profile)


class GuardConfig(Section):
    """The quality guard: stored blocks are decoded again and compared with what the artifact states."""

    share: Annotated[float, Field(ge=0, le=1)] = 0.015625
    """Share of the tier blocks that are checked when they are stored; 0 turns the guard off. Not with raw."""

    tolerance: Annotated[float, Field(ge=1, le=1000)] = 2.5
    """Measured over expected squared error from which on a gentler plan is taken, and raw when there is none
    left (policy.raw)."""


class PolicyConfig(Section):
    """Which tokens are offloaded."""

    tier_block_tokens: Annotated[int, Field(ge=1, le=65536)] = 256
    """Tokens stored as one object; a multiple of the engine's block size."""

    sink_tokens: Annotated[int, Field(ge=0, le=4096)] = 4
    """First tokens of a sequence that are kept at codec.sink_bits."""

    recent_window: Annotated[int, Field(ge=0)] = 128
    """Last tokens of a sequence that are not offloaded; the engine recomputes them."""

    minimum_tokens: Annotated[int, Field(ge=0)] = 512
    """Sequences shorter than this are not offloaded."""

    decide: Literal["measured", "always"] = "measured"
    """measured: where measured speeds say that onboarding a prefix takes longer than recomputing it, it is
    neither promised nor stored. always: whatever is found is promised."""

    prefill_tokens_per_s: Annotated[float | None, Field(gt=0, le=1e9)] = None
    """Prefill speed of the engine, until the host tells a measured one; while neither is known, nothing is
    decided by cost."""

    hysteresis: Annotated[float, Field(ge=0, le=10)] = 0.2
    """By which share onboarding must be faster than recomputing to be promised again after a refusal, and a
    coarser plan or raw faster than what is stored with."""

    raw: Literal["never", "fallback", "by_cost"] = "fallback"
    """When blocks are stored as the cache's own bytes instead of compressed: never; as the last step of the
    quality guard, which stops storing otherwise; or also where that is faster and tiers are half empty. It
    takes ratio times the bytes."""

    guard: Annotated[GuardConfig, BeforeValidator(null_is_empty)] = GuardConfig()
    """Whether stored blocks come back as well as the artifact states."""

    @model_validator(mode="after")
    def _sinks_fit(self) -> PolicyConfig:
        if self.sink_tokens > self.tier_block_tokens:
            raise ValueError(
                f"sink_tokens ({self.sink_tokens}) must fit into one tier block "
                f"({self.tier_block_tokens} tokens)"
            )
        return self


class TransferConfig(Section):
    """NIXL transfers."""

    timeout: Annotated[Duration, Field(gt=0)] = 30.0
    """Deadline for storing one tier block in all tiers; when it passes the block is dropped and counted."""

    staging: Annotated[Size, Field(ge=1024**2)] = 256 * 1024**2
    """Bytes of registered memory that stored objects pass through on their way; bounds what is in flight
    and must hold the largest object."""

    max_descriptors: Annotated[int, Field(ge=1, le=65536)] = 16384
    """Most descriptors in flight; more than 65536 kill NIXL's backends."""

    interface: Annotated[str, Field(max_length=64, pattern=r"^[A-Za-z0-9._:,@-]*$")] = "lo"
    """Network interface that UCX opens its sockets on; copies stay within the process. Empty, or with
    UCX_NET_DEVICES or UCX_TLS in the environment: as UCX chooses, by default every interface."""

    io_uring: bool = True
    """Read and write files with io_uring where a trial transfer at start shows that it works; Linux
    AIO otherwise."""

    gds: bool = False
    """Read and write files through NIXL's GDS plugin (NVIDIA GPUDirect Storage, cuFile), past the page cache,
    into the pinned staging memory. Where a GPU decodes, disk tiers without encryption are read straight into
    its memory, a fourth of `codec.gpu.memory`. Needs the kernel driver nvidia-fs; refused at start without
    it."""


class PipelineConfig(Section):
    """Offload and onboard."""

    offload_queue: Annotated[int, Field(ge=1, le=1_000_000)] = 256
    """Tier blocks that may wait to be encoded; further offloads are dropped and counted."""

    offload_batch: Annotated[int, Field(ge=1, le=1024)] = 4
    """Tier blocks gathered and encoded in one go."""

    decode_threads: Annotated[int | None, Field(ge=1, le=256)] = None
    """Threads that decode while onboarding, each on one core; by default one per core this process may
    use, 8 at the most."""

    onboard_timeout: Annotated[Duration, Field(gt=0)] = 30.0
    """Deadline of one onboard; when it passes the engine recomputes."""

    transfers_in_flight: Annotated[int, Field(ge=1, le=64)] = 3
    """Reads of one onboard that may be in flight or wait for decoding; bounds its staging memory."""


class ObservabilityConfig(Section):
    """What the process says about itself."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe log lines to write to standard error, unless the host has set up logging already."""

    metrics_port: Annotated[int | None, Field(ge=0, le=65535)] = None
    """Port of the endpoint with /metrics, /status and /healthz; 0 takes any free one, null opens none. Needs
    the extra metrics."""

    metrics_address: Annotated[str, Field(min_length=1, max_length=255)] = "127.0.0.1"
    """Address that the endpoint listens on; it has no authentication. 0.0.0.0 is every address of this
    machine, as a scraper outside of a pod needs it."""


class SecurityConfig(Section):
    """Who may share what."""

    salt: Annotated[str, Field(repr=False, max_length=1024)] = ""
    """Part of every tier key: processes with different salts never see each other's blocks. Better set
    by the environment than in a file."""

    open_folders: Literal["warn", "refuse", "allow"] = "warn"
    """What to do at start about a disk tier's folder that others than its owner have access to."""


class Config(Section):
    """The configuration of dynamo_kvtc."""

    artifact: ConfigPath | None = None
    """Folder that `dynamo-kvtc calibrate` wrote for the model; needed unless codec.profile is raw."""

    codec: CodecConfig = CodecConfig()
    """How blocks are encoded."""

    tiers: Annotated[list[TierConfig], Field(min_length=1, max_length=8), AfterValidator(check_tiers)]
    """Where encoded blocks live, from fast to slow."""

    policy: PolicyConfig = PolicyConfig()
    """What is worth offloading."""

    transfer: TransferConfig = TransferConfig()
    """How bytes move."""

    pipeline: PipelineConfig = PipelineConfig()
    """How offload and onboard run."""

    observability: ObservabilityConfig = ObservabilityConfig()
    """Logs and metrics."""

    security: SecurityConfig = SecurityConfig()
    """Isolation between tenants."""

    @field_validator("codec", "policy", "transfer", "pipeline", "observability", "security", mode="before")
    @classmethod
    def _empty_section(cls, value: object) -> object:
        return null_is_empty(value)

    @model_validator(mode="after")
    def _artifact_given(self) -> Config:
        if self.codec.profile != "raw" and self.artifact is None:
            raise ValueError(
                f"codec.profile {self.codec.profile} needs artifact: name the folder that "
                "`dynamo-kvtc calibrate` wrote, or set codec.profile to raw"
            )
        return self

    @model_validator(mode="after")
    def _coarser_plans_are_coarser(self) -> Config:
        most, ratio = self.codec.max_ratio, self.encoding.plan_ratio
        if most is not None and ratio is None:
            raise ValueError("codec.max_ratio bounds a ratio: raw has none, and max_kl is a bound itself")
        if most is not None and ratio is not None and most < ratio:
            raise ValueError(f"codec.max_ratio ({most:g}) is below the ratio ({ratio:g})")
        return self

    @model_validator(mode="after")
    def _divergences_are_known(self) -> Config:
        if self.codec.profile == "kvtc" and self.encoding.max_kl is not None:
            raise ValueError(
                "artifacts of profile kvtc state no divergences: give ratio instead of max_kl, or calibrate "
                "and configure profile rd"
            )
        return self

    @property
    def encoding(self) -> CodecConfig:
        """How blocks are encoded: `codec`, with the plan that the first tier's entry chooses."""
        own = self.tiers[0].codec
        if not own.is_set:
            return self.codec
        return self.codec.model_copy(update={"ratio": own.ratio, "max_kl": own.max_kl})


def json_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of the configuration file."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}
    for model in Section.__subclasses__():
        # Defaults as a person would write them: 256MiB, 30s.
        properties = (schema if model is Config else schema["$defs"][model.__name__])["properties"]
        for name, default in model.model_construct().model_dump(mode="json").items():
            properties[name]["default"] = default
    return schema
