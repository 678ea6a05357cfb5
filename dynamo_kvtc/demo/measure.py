"""What the demo measures, as plain records ready for JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dynamo_kvtc.evaluation import EvaluationReport
from dynamo_kvtc.pipeline.timeline import Interval

__all__ = [
    "Conversation",
    "DemoReport",
    "Onboard",
    "ServingMeasurements",
    "TierBytes",
    "TimeToFirstToken",
]


@dataclass(frozen=True, slots=True)
class TierBytes:
    """What one tier holds of the conversation. `ratio` is 16-bit bytes over all stored bytes."""

    tier: str
    tier_blocks: int
    tokens: int
    raw_bytes: int
    stored_bytes: int

    @property
    def ratio(self) -> float:
        """Raw over stored bytes, headers and side data and sinks counted."""
        return self.raw_bytes / self.stored_bytes


@dataclass(frozen=True, slots=True)
class TimeToFirstToken:
    """Median seconds to the first new token after a document of `tokens` tokens."""

    tokens: int
    onboarded_tokens: int
    recompute_s: float
    onboard_host_s: float
    onboard_disk_s: float


@dataclass(frozen=True, slots=True)
class Onboard:
    """One onboard from disk: where its time went.

    `transfer_s`, `open_s` and `project_s` are the times during which the stage was at work; `overlap` is
    transfer plus decode (open and project) over the wall time. `disk_bytes_per_s` is the bandwidth that
    the disk was throttled to, or None.
    """

    disk_bytes_per_s: float | None
    tokens: int
    wall_s: float
    transfer_s: float
    open_s: float
    project_s: float
    first_layer_s: float
    overlap: float
    intervals: tuple[Interval, ...]
    layer_ready_s: dict[int, float]


@dataclass(frozen=True, slots=True)
class Conversation:
    """The second turn of the conversation over onboarded KV against the same turn over uncompressed KV.

    `kl` is the mean Kullback-Leibler divergence, in nats, of the next-token distributions over
    `scored_tokens` positions; `top1` the share of positions with the same most likely token.
    """

    context_tokens: int
    onboarded_tokens: int
    recomputed_tokens: int
    scored_tokens: int
    kl: float
    top1: float
    same_continuation: bool
    same_leading_tokens: int
    generated_tokens: int
    text_uncompressed: str
    text_onboarded: str


@dataclass(frozen=True, slots=True)
class ServingMeasurements:
    """The conversation and the measurements around it.

    The ratios are those of the conversation: without sinks and window, with sinks, with both.
    """

    tiers: tuple[TierBytes, ...]
    ratio_without_sinks: float
    ratio_with_sinks: float
    ratio_with_sinks_and_window: float
    time_to_first_token: tuple[TimeToFirstToken, ...]
    onboards: tuple[Onboard, ...]
    conversation: Conversation


@dataclass(frozen=True, slots=True)
class DemoReport:
    """Everything the demo prints.

    `profile`, `nominal_ratio` and `artifact_id` are what the tiers ran with. `calibration_s` and `quality`
    (what `evaluate` reports) hold all profiles, by name. `token_bytes` are the 16-bit bytes of one token.
    """

    model: str
    token_bytes: int
    profile: str
    nominal_ratio: float
    artifact_id: str
    calibration_s: dict[str, float]
    serving: ServingMeasurements
    quality: dict[str, EvaluationReport]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON."""
        report = asdict(self)
        report["quality"] = {profile: quality.to_dict() for profile, quality in self.quality.items()}
        for record, tier in zip(report["serving"]["tiers"], self.serving.tiers, strict=True):
            record["ratio"] = tier.ratio
        return report
