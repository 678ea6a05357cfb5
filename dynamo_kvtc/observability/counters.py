"""The counters of the pipeline and the snapshot that ``status`` returns.

Counters only grow; rates and ratios are for the reader to derive from two snapshots. Reasons and
stages are closed sets, so that an exporter can never be flooded with labels.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from dynamo_kvtc import errors
from dynamo_kvtc.errors import (
    BitstreamError,
    KvtcError,
    ObjectCorruptError,
    ObjectMissingError,
    OnboardCancelledError,
    StreamMismatchError,
    TierClosedError,
    TransferError,
    TransferTimeoutError,
)
from dynamo_kvtc.observability.histogram import Histogram

__all__ = [
    "Action",
    "Counters",
    "DropReason",
    "MissReason",
    "Outcome",
    "Snapshot",
    "Stage",
    "Step",
    "error_type",
    "miss_reason",
]

#: Why a tier block was not offloaded.
DropReason = Literal[
    "queue_full", "unencodable", "tier_full", "transfer", "timeout", "cancelled", "closed", "error"
]

#: Why a tier block that a tier promised could not be onboarded.
MissReason = Literal["missing", "damaged", "mismatch", "transfer", "timeout", "cancelled", "closed", "error"]

#: What the pipeline spends time on.
Stage = Literal["gather", "encode", "store", "transfer", "decode"]

#: How an onboard ended: every tier block in place, only the leading ones, or none.
Outcome = Literal["complete", "partial", "failed"]

#: Where the policy decides.
Step = Literal["offload", "onboard"]

#: What it decides: how a tier block is stored (with the configured plan, a coarser one that was allowed, a
#: gentler one that the quality guard took, raw) or that it is not; whether a found prefix is promised.
Action = Literal["compress", "coarser", "gentler", "raw", "skip", "onboard", "trim", "recompute", "probe"]

# The first class that fits names the reason, so subclasses stand before their bases.
_MISS_REASONS: tuple[tuple[type[KvtcError], MissReason], ...] = (
    (OnboardCancelledError, "cancelled"),
    (ObjectMissingError, "missing"),
    (ObjectCorruptError, "damaged"),
    (StreamMismatchError, "mismatch"),
    (BitstreamError, "damaged"),
    (TransferTimeoutError, "timeout"),
    (TransferError, "transfer"),
    (TierClosedError, "closed"),
)


def miss_reason(error: BaseException) -> MissReason:
    """Return the reason under which an error that ended an onboard is counted."""
    for kind, reason in _MISS_REASONS:
        if isinstance(error, kind):
            return reason
    return "error"


def error_type(error: BaseException) -> str:
    """Return the class of an error of this package, or ``"unexpected"``: a closed set of labels."""
    name = type(error).__name__
    return name if name in errors.__all__ else "unexpected"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The counters of one process at one moment, since its start.

    Attributes
    ----------
    lookups : int
        Lookups, one per request that asked.
    looked_up_blocks, found_blocks : int
        Tier blocks asked for in lookups and those that a tier held: the denominator and the
        numerator of the hit rate.
    looked_up_tokens, found_tokens : int
        The same in tokens; the tokens behind a sequence's last whole tier block are asked for, too.
    offloaded_blocks, offloaded_tokens : int
        Tier blocks stored, and their tokens.
    offloaded_raw_bytes, offloaded_stored_bytes : int
        Their size in the cache's dtype, and the size of the stored objects, headers included.
    encoded_blocks : Mapping[str, int]
        Tier blocks stored, by what they were encoded with; only encoders that were used.
    onboarded_blocks, onboarded_tokens, onboarded_raw_bytes, onboarded_stored_bytes : int
        The same of tier blocks whose KV is in place for every layer.
    dropped_blocks : Mapping[str, int]
        Tier blocks not offloaded, by `DropReason`; every reason is present.
    missed_blocks : Mapping[str, int]
        Tier blocks found in a lookup and not onboarded, by `MissReason`; every reason is present.
    stage_seconds : Mapping[str, float]
        Seconds spent per `Stage`. Stages overlap: their sum over the wall time is the overlap.
    errors : Mapping[str, int]
        Failures by the class of the error; only classes that occurred.
    onboards : Mapping[str, int]
        Onboards by `Outcome`; every outcome is present.
    onboard_busy_seconds : Mapping[str, float]
        Seconds of onboards in which at least one transfer, or at least one decode, was under way.
        Their sum over the sum of `onboard_seconds` is the overlap: 1 is none, 2 is perfect.
    onboard_seconds, first_layer_seconds : Mapping[str, Any]
        Histograms: from the start of an onboard to its end, and to its first layer in place.
    recompute_avoided_seconds : float
        What the prefill of the onboarded tokens would have taken at the speed known then; 0 while the
        prefill speed is unknown.
    decisions : Mapping[str, Mapping[str, int]]
        The policy's decisions by `Step` and `Action`; at offload in tier blocks, at onboard in lookups.
    """

    lookups: int
    looked_up_blocks: int
    found_blocks: int
    looked_up_tokens: int
    found_tokens: int
    offloaded_blocks: int
    offloaded_tokens: int
    offloaded_raw_bytes: int
    offloaded_stored_bytes: int
    onboarded_blocks: int
    onboarded_tokens: int
    onboarded_raw_bytes: int
    onboarded_stored_bytes: int
    dropped_blocks: Mapping[str, int]
    missed_blocks: Mapping[str, int]
    stage_seconds: Mapping[str, float]
    errors: Mapping[str, int]
    onboards: Mapping[str, int]
    onboard_busy_seconds: Mapping[str, float]
    onboard_seconds: Mapping[str, Any]
    first_layer_seconds: Mapping[str, Any]
    recompute_avoided_seconds: float
    decisions: Mapping[str, Mapping[str, int]]
    encoded_blocks: Mapping[str, int]

    @property
    def offload_ratio(self) -> float | None:
        """Raw over stored bytes of everything offloaded; None before the first."""
        stored = self.offloaded_stored_bytes
        return self.offloaded_raw_bytes / stored if stored else None

    @property
    def hit_rate(self) -> float | None:
        """Found over looked-up tier blocks; None before the first lookup."""
        asked = self.looked_up_blocks
        return self.found_blocks / asked if asked else None

    @property
    def overlap(self) -> float | None:
        """Transfer plus decode time over the wall time of all onboards; None before the first."""
        wall = self.onboard_seconds["sum"]
        return sum(self.onboard_busy_seconds.values()) / wall if wall else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON, with the derived ratios."""
        derived = {"offload_ratio": self.offload_ratio, "hit_rate": self.hit_rate, "overlap": self.overlap}
        return {**asdict(self), **derived}


class Counters:
    """Thread-safe counters; one instance per pipeline."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._totals = dict.fromkeys(
            (
                *("lookups", "looked_up_blocks", "found_blocks", "looked_up_tokens", "found_tokens"),
                *(f"offloaded_{unit}" for unit in ("blocks", "tokens", "raw_bytes", "stored_bytes")),
                *(f"onboarded_{unit}" for unit in ("blocks", "tokens", "raw_bytes", "stored_bytes")),
            ),
            0,
        )
        self._dropped: dict[str, int] = dict.fromkeys(get_args(DropReason), 0)
        self._missed: dict[str, int] = dict.fromkeys(get_args(MissReason), 0)
        self._seconds: dict[str, float] = dict.fromkeys(get_args(Stage), 0.0)
        self._errors: dict[str, int] = {}
        self._onboards: dict[str, int] = dict.fromkeys(get_args(Outcome), 0)
        self._busy = {"transfer": 0.0, "decode": 0.0}
        self._onboard_seconds, self._first_layer_seconds = Histogram(), Histogram()
        self._avoided_s = 0.0
        self._decisions = {step: dict.fromkeys(get_args(Action), 0) for step in get_args(Step)}
        self._encoded: dict[str, int] = {}

    def looked_up(
        self, asked_blocks: int, found_blocks: int, asked_tokens: int = 0, found_tokens: int = 0
    ) -> None:
        """Count one lookup of `asked_blocks` tier blocks, of which a tier held `found_blocks`."""
        self._add(
            lookups=1,
            looked_up_blocks=asked_blocks,
            found_blocks=found_blocks,
            looked_up_tokens=asked_tokens,
            found_tokens=found_tokens,
        )

    def offloaded(
        self, blocks: int, tokens: int, raw_bytes: int, stored_bytes: int, encoder: str = "default"
    ) -> None:
        """Count tier blocks that became visible in a tier, and what they were encoded with."""
        with self._lock:
            self._encoded[encoder] = self._encoded.get(encoder, 0) + blocks
        self._add(
            offloaded_blocks=blocks,
            offloaded_tokens=tokens,
            offloaded_raw_bytes=raw_bytes,
            offloaded_stored_bytes=stored_bytes,
        )

    def onboarded(self, blocks: int, tokens: int, raw_bytes: int, stored_bytes: int) -> None:
        """Count tier blocks whose KV is in place for every layer."""
        self._add(
            onboarded_blocks=blocks,
            onboarded_tokens=tokens,
            onboarded_raw_bytes=raw_bytes,
            onboarded_stored_bytes=stored_bytes,
        )

    def dropped(self, reason: DropReason, blocks: int = 1) -> None:
        """Count tier blocks that were not offloaded."""
        with self._lock:
            self._dropped[reason] += blocks

    def missed(self, reason: MissReason, blocks: int = 1) -> None:
        """Count tier blocks that a lookup found and an onboard could not deliver."""
        with self._lock:
            self._missed[reason] += blocks

    def failed(self, error: BaseException) -> None:
        """Count a failure by its class."""
        name = error_type(error)
        with self._lock:
            self._errors[name] = self._errors.get(name, 0) + 1

    def onboard_ended(
        self,
        outcome: Outcome,
        *,
        seconds: float,
        first_layer_s: float | None,
        transfer_s: float,
        decode_s: float,
    ) -> None:
        """Count an onboard that has ended, and its times.

        Parameters
        ----------
        seconds : float
            From its start to its end.
        first_layer_s : float, optional
            To its first layer in place, if there was one.
        transfer_s, decode_s : float
            How long at least one transfer, and at least one decode, was under way.
        """
        with self._lock:
            self._onboards[outcome] += 1
            self._onboard_seconds.observe(seconds)
            if first_layer_s is not None:
                self._first_layer_seconds.observe(first_layer_s)
            self._busy["transfer"] += transfer_s
            self._busy["decode"] += decode_s

    def recompute_avoided(self, seconds: float) -> None:
        """Count prefill that onboarded tokens made unnecessary."""
        with self._lock:
            self._avoided_s += seconds

    def decided(self, step: Step, action: Action, count: int = 1) -> None:
        """Count decisions of the policy."""
        with self._lock:
            self._decisions[step][action] += count

    def add_seconds(self, stage: Stage, seconds: float) -> None:
        """Add time spent in a stage."""
        with self._lock:
            self._seconds[stage] += seconds

    @contextmanager
    def timed(self, stage: Stage) -> Iterator[None]:
        """Add the time that the body takes to a stage, also when it raises."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add_seconds(stage, time.perf_counter() - start)

    def snapshot(self) -> Snapshot:
        """Return a consistent copy of all counters."""
        with self._lock:
            return Snapshot(
                **self._totals,
                dropped_blocks=dict(self._dropped),
                missed_blocks=dict(self._missed),
                stage_seconds=dict(self._seconds),
                errors=dict(self._errors),
                onboards=dict(self._onboards),
                onboard_busy_seconds=dict(self._busy),
                onboard_seconds=self._onboard_seconds.to_dict(),
                first_layer_seconds=self._first_layer_seconds.to_dict(),
                recompute_avoided_seconds=self._avoided_s,
                decisions={step: dict(actions) for step, actions in self._decisions.items()},
                encoded_blocks=dict(self._encoded),
            )

    def _add(self, **amounts: int) -> None:
        with self._lock:
            for name, amount in amounts.items():
                self._totals[name] += amount
