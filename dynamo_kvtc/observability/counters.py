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

__all__ = ["Counters", "DropReason", "MissReason", "Snapshot", "Stage", "miss_reason"]

#: Why a tier block was not offloaded.
DropReason = Literal["queue_full", "unencodable", "tier_full", "transfer", "timeout", "closed", "error"]

#: Why a tier block that a tier promised could not be onboarded.
MissReason = Literal["missing", "damaged", "mismatch", "transfer", "timeout", "cancelled", "closed", "error"]

#: What the pipeline spends time on.
Stage = Literal["gather", "encode", "store", "transfer", "decode"]

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


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The counters of one process at one moment, since its start.

    Attributes
    ----------
    looked_up_blocks, found_blocks : int
        Tier blocks asked for in lookups and those that a tier held: the denominator and the
        numerator of the hit rate.
    offloaded_blocks, offloaded_tokens : int
        Tier blocks stored, and their tokens.
    offloaded_raw_bytes, offloaded_stored_bytes : int
        Their size in the cache's dtype, and the size of the stored objects, headers included.
    onboarded_blocks, onboarded_tokens, onboarded_raw_bytes, onboarded_stored_bytes : int
        The same of tier blocks whose KV is in place for every layer.
    dropped_blocks : Mapping[str, int]
        Tier blocks not offloaded, by `DropReason`; every reason is present.
    missed_blocks : Mapping[str, int]
        Tier blocks found in a lookup and not onboarded, by `MissReason`; every reason is present.
    stage_seconds : Mapping[str, float]
        Seconds spent per `Stage`. Stages overlap: their sum over the wall time is the overlap.
    """

    looked_up_blocks: int
    found_blocks: int
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

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON, with the derived ratios."""
        return {**asdict(self), "offload_ratio": self.offload_ratio, "hit_rate": self.hit_rate}


class Counters:
    """Thread-safe counters; one instance per pipeline."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._totals = dict.fromkeys(
            (
                *("looked_up_blocks", "found_blocks"),
                *(f"offloaded_{unit}" for unit in ("blocks", "tokens", "raw_bytes", "stored_bytes")),
                *(f"onboarded_{unit}" for unit in ("blocks", "tokens", "raw_bytes", "stored_bytes")),
            ),
            0,
        )
        self._dropped: dict[str, int] = dict.fromkeys(get_args(DropReason), 0)
        self._missed: dict[str, int] = dict.fromkeys(get_args(MissReason), 0)
        self._seconds: dict[str, float] = dict.fromkeys(get_args(Stage), 0.0)

    def looked_up(self, asked_blocks: int, found_blocks: int) -> None:
        """Count one lookup of `asked_blocks` tier blocks, of which a tier held `found_blocks`."""
        self._add(looked_up_blocks=asked_blocks, found_blocks=found_blocks)

    def offloaded(self, blocks: int, tokens: int, raw_bytes: int, stored_bytes: int) -> None:
        """Count tier blocks that became visible in a tier."""
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
            )

    def _add(self, **amounts: int) -> None:
        with self._lock:
            for name, amount in amounts.items():
                self._totals[name] += amount
