"""Every metric: its name, kind, unit, labels, and how it is read from a status.

A status is the plain mapping that `AdapterStatus.to_dict` gives and the endpoint serves as JSON, so the same
functions serve this process, a host that gathers statuses from its workers, and a test. Names and units are
stable; `docs/metrics.md` lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["METRICS", "PREFIX", "Family", "Metric", "Sample", "metric_families"]

#: What every name begins with.
PREFIX = "dynamo_kvtc_"

Kind = Literal["counter", "gauge", "histogram"]
Status = Mapping[str, Any]

#: Label values, and the value: a number, or a histogram as `Histogram.to_dict` gives it.
Sample = tuple[tuple[str, ...], Any]


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric.

    Attributes
    ----------
    name : str
        Full name as it is exposed; counters end in ``_total``.
    help : str
        One sentence, with the unit.
    labels : tuple[str, ...]
        Label names. Their values come from closed sets, the names of tiers, and the artifact's id and plans.
    read : Callable
        Gives the samples of a status; none where a status has no such value yet.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...]
    read: Callable[[Status], Iterable[Sample]]


@dataclass(frozen=True, slots=True)
class Family:
    """A metric with its samples at one moment."""

    metric: Metric
    samples: tuple[Sample, ...]


def metric_families(status: Status) -> list[Family]:
    """Return every metric that a status has values for.

    Parameters
    ----------
    status : Mapping
        What `AdapterStatus.to_dict` returns.
    """
    families = (Family(metric, tuple(metric.read(status))) for metric in METRICS)
    return [family for family in families if family.samples]


# --- how values are read ---------------------------------------------------------------------------


def _at(*path: str) -> Callable[[Status], Iterator[Sample]]:
    """Read one number; absent or null gives no sample."""

    def read(status: Status) -> Iterator[Sample]:
        value: Any = status
        for key in path:
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is not None:
            yield (), value

    return read


def _by(*path: str) -> Callable[[Status], Iterator[Sample]]:
    """Read a mapping of numbers, one label value each; of mappings of numbers, two."""

    def read(status: Status) -> Iterator[Sample]:
        for _, found in _at(*path)(status):
            for label, value in found.items():
                if isinstance(value, Mapping):
                    yield from (((label, inner), number) for inner, number in value.items())
                elif value is not None:
                    yield (label,), value

    return read


def _tier(field: str) -> Callable[[Status], Iterator[Sample]]:
    def read(status: Status) -> Iterator[Sample]:
        for name, stats in status.get("tiers", {}).items():
            if field in stats:
                yield (name,), stats[field]

    return read


def _tier_by(field: str) -> Callable[[Status], Iterator[Sample]]:
    def read(status: Status) -> Iterator[Sample]:
        for name, stats in status.get("tiers", {}).items():
            yield from (((name, label), value) for label, value in stats.get(field, {}).items())

    return read


def _info(status: Status) -> Iterator[Sample]:
    artifact = status.get("artifact")
    if artifact:
        values = (artifact.get("id"), artifact.get("profile"), artifact.get("plan"), status.get("version"))
        yield tuple("" if value is None else str(value) for value in values), 1


def _states(*path: str, states: tuple[str, ...]) -> Callable[[Status], Iterator[Sample]]:
    def read(status: Status) -> Iterator[Sample]:
        for _, present in _at(*path)(status):
            yield from (((state,), int(state == present)) for state in states)

    return read


#: States of the quality guard, from the least to the most severe.
GUARD_STATES = ("off", "ok", "raised", "raw", "stopped")


def _counter(name: str, text: str, read: Any, *labels: str) -> Metric:
    return Metric(f"{PREFIX}{name}_total", "counter", text, labels, read)


def _gauge(name: str, text: str, read: Any, *labels: str) -> Metric:
    return Metric(f"{PREFIX}{name}", "gauge", text, labels, read)


def _histogram(name: str, text: str, read: Any) -> Metric:
    return Metric(f"{PREFIX}{name}", "histogram", text, (), read)


#: Every metric, in the order of the reference.
METRICS: tuple[Metric, ...] = (
    _gauge(
        "artifact_info",
        "1, with what blocks are encoded with as labels.",
        _info,
        *("artifact_id", "profile", "plan", "version"),
    ),
    # Is it compressing, and how much?
    _gauge(
        "compression_ratio",
        "Raw over stored bytes of everything offloaded since the start, headers counted.",
        _at("counters", "offload_ratio"),
    ),
    _counter("offloaded_blocks", "Tier blocks stored.", _at("counters", "offloaded_blocks")),
    _counter("offloaded_tokens", "Tokens stored.", _at("counters", "offloaded_tokens")),
    _counter(
        "offloaded_raw_bytes", "Bytes stored, in the cache's dtype.", _at("counters", "offloaded_raw_bytes")
    ),
    _counter(
        "offloaded_stored_bytes",
        "Bytes stored, as they are stored, headers counted.",
        _at("counters", "offloaded_stored_bytes"),
    ),
    # Does it find what is asked for?
    _counter("lookups", "Lookups, one per request that asked.", _at("counters", "lookups")),
    _counter("lookup_blocks", "Tier blocks asked for in lookups.", _at("counters", "looked_up_blocks")),
    _counter("lookup_hit_blocks", "Of these, held by a tier.", _at("counters", "found_blocks")),
    _counter("lookup_tokens", "Tokens asked for in lookups.", _at("counters", "looked_up_tokens")),
    _counter("lookup_hit_tokens", "Of these, held by a tier.", _at("counters", "found_tokens")),
    # Is it faster than not?
    _counter("onboards", "Onboards by how they ended.", _by("counters", "onboards"), "outcome"),
    _counter("onboarded_blocks", "Tier blocks put in place.", _at("counters", "onboarded_blocks")),
    _counter(
        "onboarded_tokens",
        "Tokens put in place: tokens saved from recomputation.",
        _at("counters", "onboarded_tokens"),
    ),
    _counter(
        "onboarded_raw_bytes",
        "Bytes put in place, in the cache's dtype.",
        _at("counters", "onboarded_raw_bytes"),
    ),
    _counter(
        "onboarded_stored_bytes",
        "Bytes put in place, as they are stored.",
        _at("counters", "onboarded_stored_bytes"),
    ),
    _histogram(
        "onboard_seconds",
        "Seconds from the start of an onboard to its end.",
        _at("counters", "onboard_seconds"),
    ),
    _histogram(
        "onboard_first_layer_seconds",
        "Seconds from the start of an onboard to its first layer in place.",
        _at("counters", "first_layer_seconds"),
    ),
    _counter(
        "onboard_busy_seconds",
        "Seconds of onboards in which at least one transfer, or one decode, was under way.",
        _by("counters", "onboard_busy_seconds"),
        "stage",
    ),
    _gauge(
        "onboard_overlap",
        "Transfer plus decode time over wall time of all onboards: 1 is none, 2 is perfect.",
        _at("counters", "overlap"),
    ),
    _counter(
        "recompute_avoided_seconds",
        "Seconds that the prefill of the onboarded tokens would have taken, where its speed is known.",
        _at("counters", "recompute_avoided_seconds"),
    ),
    _counter(
        "stage_seconds",
        "Seconds spent in gather, encode, store, transfer and decode, summed over threads.",
        _by("counters", "stage_seconds"),
        "stage",
    ),
    _gauge(
        "prefill_tokens_per_second", "Prefill speed that the policy reckons with.", _at("speeds", "prefill")
    ),
    _gauge("encode_tokens_per_second", "Measured speed of encoding.", _by("speeds", "encode"), "encoder"),
    _gauge("decode_tokens_per_second", "Measured speed of decoding.", _at("speeds", "decode")),
    _gauge("read_bytes_per_second", "Measured speed of reading from a tier.", _by("speeds", "read"), "tier"),
    # What was decided?
    _counter(
        "decisions",
        "Decisions of the policy: tier blocks at offload, lookups at onboard.",
        _by("counters", "decisions"),
        *("step", "action"),
    ),
    _counter(
        "encoded_blocks",
        "Tier blocks stored, by what they were encoded with: profile and plan, or raw.",
        _by("counters", "encoded_blocks"),
        "encoder",
    ),
    # Is anything wrong?
    _counter(
        "dropped_blocks",
        "Tier blocks not offloaded, by reason.",
        _by("counters", "dropped_blocks"),
        "reason",
    ),
    _counter(
        "missed_blocks",
        "Tier blocks that a lookup found and an onboard could not deliver, by reason.",
        _by("counters", "missed_blocks"),
        "reason",
    ),
    _counter("errors", "Failures by the class of the error.", _by("counters", "errors"), "type"),
    _gauge("offloads_pending", "Tier blocks that wait to be encoded.", _at("offloads_pending")),
    _gauge("offload_queue_limit", "Tier blocks that may wait to be encoded.", _at("offload_queue_limit")),
    _gauge("onboards_active", "Onboards under way.", _at("onboards_active")),
    _gauge(
        "guard_state",
        "1 for the quality guard's state: off, ok, raised (a gentler plan), raw, stopped (nothing stored).",
        _states("guard", "state", states=GUARD_STATES),
        "state",
    ),
    _gauge("guard_level", "Steps that the guard stands above the configured plan.", _at("guard", "level")),
    _gauge(
        "guard_error_ratio",
        "Measured over expected error of the sampled tier blocks, smoothed; 1 is as calibrated.",
        _at("guard", "error_ratio"),
    ),
    _counter(
        "guard_checks", "Tier blocks that the guard decoded, by result.", _by("guard", "checks"), "result"
    ),
    _counter(
        "guard_seconds", "Seconds that the guard spent decoding and comparing.", _at("guard", "seconds")
    ),
    # The tiers.
    _gauge("tier_objects", "Objects in a tier.", _tier("objects"), "tier"),
    _gauge("tier_stored_bytes", "Bytes of a tier's objects.", _tier("stored_bytes"), "tier"),
    _gauge("tier_capacity_bytes", "Bytes that a tier may take.", _tier("capacity_bytes"), "tier"),
    _gauge(
        "tier_allocated_bytes",
        "Bytes that a tier takes, rounding and record headers counted.",
        _tier("allocated_bytes"),
        "tier",
    ),
    _gauge(
        "tier_largest_free_bytes",
        "Largest object, in bytes, that fits without evicting.",
        _tier("largest_free_bytes"),
        "tier",
    ),
    _gauge("tier_pinned_objects", "Objects that must not be evicted now.", _tier("pinned_objects"), "tier"),
    _counter("tier_lookup_blocks", "Tier blocks that a tier was asked for.", _tier("lookups"), "tier"),
    _counter("tier_hit_blocks", "Of these, held by the tier.", _tier("hits"), "tier"),
    _counter("tier_puts", "Objects stored in a tier.", _tier("puts"), "tier"),
    _counter("tier_written_bytes", "Bytes written into a tier.", _tier("bytes_written"), "tier"),
    _counter("tier_read_bytes", "Bytes read from a tier.", _tier("bytes_read"), "tier"),
    _counter("tier_evictions", "Objects evicted from a tier.", _tier("evictions"), "tier"),
    _counter("tier_rejected_full", "Objects that a tier had no room for.", _tier("rejected_full"), "tier"),
    _counter(
        "tier_corrupt_dropped",
        "Objects that failed a tier's length or checksum and were dropped.",
        _tier("corrupt_dropped"),
        "tier",
    ),
    _counter(
        "tier_not_admitted",
        "Objects that were kept out of a tier: not asked for often enough, over the write budget, or dropped "
        "because too many waited to be written or one waited too long.",
        _tier_by("not_admitted"),
        *("tier", "reason"),
    ),
    _counter(
        "tier_pauses",
        "How often a tier was left alone because it kept failing or timing out.",
        _tier("pauses"),
        "tier",
    ),
    _gauge("tier_paused", "1 while a tier is passed over for that reason.", _tier("paused"), "tier"),
    _gauge(
        "tier_waiting_objects", "Objects on their way into a tier, written behind.", _tier("waiting"), "tier"
    ),
    _counter("promotions", "Objects copied from a slower tier into the first.", _at("promotions")),
    _counter(
        "failed_puts", "Puts that a tier failed while another tier took the object.", _at("failed_puts")
    ),
)
