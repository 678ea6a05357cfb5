"""The settings: every key with its type, bounds, default and meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from dynamo_kvtc.config.units import Duration, Size

__all__ = [
    "CodecConfig",
    "Config",
    "DiskTierConfig",
    "HostTierConfig",
    "ObservabilityConfig",
    "PipelineConfig",
    "PolicyConfig",
    "SecurityConfig",
    "TierCodecConfig",
    "TierConfig",
    "TransferConfig",
    "json_schema",
]


def _resolve(value: object, info: ValidationInfo) -> object:
    """Make a path absolute: ``~`` is the home folder, relative paths start at the file's folder."""
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError(f"{value!r} is not a path")
    path = Path(value).expanduser()
    folder = (info.context or {}).get("folder")
    return Path(folder, path) if folder is not None else path


#: A path; relative ones are resolved against the folder of the configuration file.
ConfigPath = Annotated[Path, BeforeValidator(_resolve), WithJsonSchema({"type": "string", "minLength": 1})]


class _Section(BaseModel):
    """A mapping with known keys only. No value is coerced from another type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


_Ratio = Annotated[float, Field(ge=1, le=4096)]
_Divergence = Annotated[float, Field(gt=0, le=100)]

#: Ratio that is encoded with if nothing is said, by profile.
_DEFAULT_RATIOS = {"rd": 20.0, "kvtc": 16.0}


def _check_one_plan(ratio: float | None, max_kl: float | None) -> None:
    if ratio is not None and max_kl is not None:
        raise ValueError("ratio and max_kl both choose the plan; give one of them")


class CodecConfig(_Section):
    """How blocks are encoded at the boundary from G1 to the first tier."""

    profile: Literal["rd", "kvtc", "raw"] = "rd"
    """rd and kvtc compress with an artifact of theirs, kvtc by the published method; raw stores the cache's
    exact bytes."""

    ratio: _Ratio | None = None
    """Ratio to encode with: of real streams with rd, before entropy coding with kvtc. The artifact must have
    a plan for it. If neither it nor max_kl is given, 20 with rd and 16 with kvtc. Unused by raw."""

    max_kl: _Divergence | None = None
    """Instead of ratio, with rd: the artifact's plan with the highest ratio whose next-token KL (nats) was at
    most this in calibration."""

    sink_bits: Literal[8, 16] = 8
    """Bits per element of sink tokens: 8 (fp8 with a scale per head) or 16 (the cache's own bytes)."""

    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the projections; auto is bfloat16 where the CPU multiplies it in hardware."""

    threads: Annotated[int | None, Field(ge=1, le=1024)] = None
    """Threads that entropy-code chunks; by default one per core this process may use."""

    @model_validator(mode="after")
    def _one_plan(self) -> CodecConfig:
        _check_one_plan(self.ratio, self.max_kl)
        return self

    @property
    def plan_ratio(self) -> float | None:
        """The ratio to encode with, or None where `max_kl` or nothing chooses the plan."""
        if self.ratio is not None or self.max_kl is not None:
            return self.ratio
        return _DEFAULT_RATIOS.get(self.profile)


class TierCodecConfig(_Section):
    """With which plan blocks are encoded on their way into a tier, where that differs from `codec`."""

    ratio: _Ratio | None = None
    """As codec.ratio."""

    max_kl: _Divergence | None = None
    """As codec.max_kl."""

    @model_validator(mode="after")
    def _one_plan(self) -> TierCodecConfig:
        _check_one_plan(self.ratio, self.max_kl)
        return self

    @property
    def is_set(self) -> bool:
        """Whether anything is set."""
        return self.ratio is not None or self.max_kl is not None


def _null_is_empty(value: object) -> object:
    # A section whose lines are all commented out reads as null.
    return {} if value is None else value


_TierCodec = Annotated[TierCodecConfig, BeforeValidator(_null_is_empty)]


class HostTierConfig(_Section):
    """Host memory (G2): fast, and gone when the process ends."""

    kind: Literal["host"]
    """Chooses this kind of tier."""

    capacity: Annotated[Size, Field(gt=0)]
    """Bytes of memory for stored objects, headers included; pages are taken as they are first written."""

    codec: _TierCodec = TierCodecConfig()
    """The plan to encode with, if this is the first tier; if it is empty, codec's counts."""


class DiskTierConfig(_Section):
    """A folder on a local disk (G3); survives restarts."""

    kind: Literal["disk"]
    """Chooses this kind of tier."""

    path: ConfigPath
    """Folder of the tier's segment files; made if it is missing."""

    capacity: Annotated[Size, Field(gt=0)]
    """Bytes that the folder may take; the least recently used objects go first."""

    segment_size: Annotated[Size, Field(ge=1024**2)] = 256 * 1024**2
    """Bytes of one segment file; larger ones are used where the capacity would need more than 256."""

    shared: bool = False
    """Whether several workers of one machine use the folder, each reading what all of them wrote. Capacity is
    then that of each worker's own objects. All of them must say so; a second process is refused without
    it."""

    durability: Literal["none", "fsync"] = "none"
    """none: objects survive the process; after a power cut recent ones may be missing, or damaged and
    found out by their checksums. fsync: what was stored survives a power cut."""

    codec: _TierCodec = TierCodecConfig()
    """The plan to encode with, if this is the first tier; if it is empty, codec's counts."""


TierConfig = Annotated[HostTierConfig | DiskTierConfig, Field(discriminator="kind")]


class PolicyConfig(_Section):
    """Which tokens are offloaded."""

    tier_block_tokens: Annotated[int, Field(ge=1, le=65536)] = 256
    """Tokens stored as one object; a multiple of the engine's block size."""

    sink_tokens: Annotated[int, Field(ge=0, le=4096)] = 4
    """First tokens of a sequence that are kept at codec.sink_bits."""

    recent_window: Annotated[int, Field(ge=0)] = 128
    """Last tokens of a sequence that are not offloaded; the engine recomputes them."""

    minimum_tokens: Annotated[int, Field(ge=0)] = 512
    """Sequences shorter than this are not offloaded."""

    @model_validator(mode="after")
    def _sinks_fit(self) -> PolicyConfig:
        if self.sink_tokens > self.tier_block_tokens:
            raise ValueError(
                f"sink_tokens ({self.sink_tokens}) must fit into one tier block "
                f"({self.tier_block_tokens} tokens)"
            )
        return self


class TransferConfig(_Section):
    """NIXL transfers."""

    timeout: Annotated[Duration, Field(gt=0)] = 30.0
    """Deadline for storing one tier block in all tiers; when it passes the block is dropped and counted."""

    staging: Annotated[Size, Field(ge=1024**2)] = 256 * 1024**2
    """Bytes of registered memory that stored objects pass through on their way; bounds what is in flight
    and must hold the largest object."""

    max_descriptors: Annotated[int, Field(ge=1, le=65536)] = 16384
    """Most descriptors in flight; more than 65536 kill NIXL's backends."""

    io_uring: bool = True
    """Read and write files with io_uring where a trial transfer at start shows that it works; Linux
    AIO otherwise."""


class PipelineConfig(_Section):
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


class ObservabilityConfig(_Section):
    """What the process says about itself."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe log lines to write to standard error, unless the host has set up logging already."""

    metrics_port: Annotated[int | None, Field(ge=0, le=65535)] = None
    """Port of the endpoint with /metrics, /status and /healthz; 0 takes any free one, null opens none. Needs
    the extra metrics."""

    metrics_address: Annotated[str, Field(min_length=1, max_length=255)] = "127.0.0.1"
    """Address that the endpoint listens on; it has no authentication. 0.0.0.0 is every address of this
    machine, as a scraper outside of a pod needs it."""


class SecurityConfig(_Section):
    """Who may share what."""

    salt: Annotated[str, Field(repr=False, max_length=1024)] = ""
    """Part of every tier key: processes with different salts never see each other's blocks. Better set
    by the environment than in a file."""


def _check_tiers(tiers: list[TierConfig]) -> list[TierConfig]:
    """Refuse orders and places that contradict each other."""
    kinds = [tier.kind for tier in tiers]
    if kinds.count("host") > 1:
        raise ValueError("there can be one host tier; give it the sum of the capacities")
    if "host" in kinds[1:]:
        raise ValueError("tiers are listed from fast to slow: the host tier comes first")
    if any(tier.codec.is_set for tier in tiers[1:]):
        raise ValueError(
            "blocks are encoded once, on their way into the first tier, and tiers below take its bytes: put "
            "codec into the first tier's entry"
        )
    places = [tier.path.resolve() for tier in tiers if isinstance(tier, DiskTierConfig)]
    for index, place in enumerate(places):
        for other in places[:index]:
            if place == other or place in other.parents or other in place.parents:
                raise ValueError(f"two disk tiers cannot share a folder: {other} and {place}")
    return tiers


class Config(_Section):
    """The configuration of dynamo_kvtc."""

    artifact: ConfigPath | None = None
    """Folder that `dynamo-kvtc calibrate` wrote for the model; needed unless codec.profile is raw."""

    codec: CodecConfig = CodecConfig()
    """How blocks are encoded."""

    tiers: Annotated[list[TierConfig], Field(min_length=1, max_length=8), AfterValidator(_check_tiers)]
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
        return _null_is_empty(value)

    @model_validator(mode="after")
    def _artifact_given(self) -> Config:
        if self.codec.profile != "raw" and self.artifact is None:
            raise ValueError(
                f"codec.profile {self.codec.profile} needs artifact: name the folder that "
                "`dynamo-kvtc calibrate` wrote, or set codec.profile to raw"
            )
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
    for model in _Section.__subclasses__():
        # Defaults as a person would write them: 256MiB, 30s.
        properties = (schema if model is Config else schema["$defs"][model.__name__])["properties"]
        for name, default in model.model_construct().model_dump(mode="json").items():
            properties[name]["default"] = default
    return schema
