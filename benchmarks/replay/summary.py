"""What a replay comes to: percentiles, where tokens came from, bytes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.replay.run import PASSES, RECOMPUTE

__all__ = ["summarise"]

_PERCENTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


def summarise(repetitions: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Return the figures of each variant, by pass.

    ``recompute_over_this`` holds the times of recomputing over those of the variant: at percentiles of all
    requests, and of the means with the least and the most of any repetition.
    """
    return {
        name: {variant: _variant(repetitions, name, variant) for variant in repetitions[0][name]}
        for name in PASSES
    }


def _variant(
    repetitions: Sequence[Mapping[str, Mapping[str, Any]]], name: str, variant: str
) -> dict[str, Any]:
    each = [repetition[name][variant] for repetition in repetitions]
    exact = [repetition[name][RECOMPUTE] for repetition in repetitions]
    answers = [answer for one in each for answer in one["answers"]]
    expected = [answer for one in exact for answer in one["answers"]]
    times, base = [a["ttft_s"] for a in answers], [a["ttft_s"] for a in expected]
    by_repetition = [_mean_ttft(one) / _mean_ttft(other) for one, other in zip(exact, each, strict=True)]
    tokens = sum(a["in_cache"] + a["onboarded"] + a["computed"] for a in answers)
    found: dict[str, Any] = {
        "requests": len(answers),
        "ttft_s": {key: _percentile(times, share) for key, share in _PERCENTILES.items()}
        | {"mean": statistics.mean(times)},
        "recompute_over_this": {
            key: _percentile(base, share) / _percentile(times, share) for key, share in _PERCENTILES.items()
        }
        | {
            "mean": statistics.mean(base) / statistics.mean(times),
            "mean_least": min(by_repetition),
            "mean_most": max(by_repetition),
        },
        # First token and the offload behind it, as when the next request waits for both.
        "recompute_over_this_with_offload": statistics.mean(base)
        / statistics.mean(a["ttft_s"] + a["offload_s"] for a in answers),
        "tokens": tokens,
        "from_paged_cache": sum(a["in_cache"] for a in answers) / tokens,
        "from_tiers": sum(a["onboarded"] for a in answers) / tokens,
        "computed": sum(a["computed"] for a in answers) / tokens,
        "same_first_token": statistics.mean(
            a["first_token"] == b["first_token"] for a, b in zip(answers, expected, strict=True)
        ),
    }
    statuses = [one["status"] for one in each if one["status"] is not None]
    return found | (_bytes(statuses) if statuses else {})


def _bytes(statuses: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    counters = [status["counters"] for status in statuses]
    tiers = statuses[0]["tiers"]
    return {
        "ratio": statistics.mean(one["offload_ratio"] or 0.0 for one in counters),
        "offloaded_bytes": sum(one["offloaded_stored_bytes"] for one in counters),
        "onboarded_bytes": sum(one["onboarded_stored_bytes"] for one in counters),
        "evictions": {name: sum(one["tiers"][name]["evictions"] for one in statuses) for name in tiers},
        "stored_bytes": {name: sum(one["tiers"][name]["stored_bytes"] for one in statuses) for name in tiers},
        "decisions": [one["decisions"] for one in counters],
    }


def _mean_ttft(one: Mapping[str, Any]) -> float:
    return statistics.mean(answer["ttft_s"] for answer in one["answers"])


def _percentile(values: Sequence[float], share: float) -> float:
    """Return the value that at least `share` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
