"""Plots of a replay, and the dashboard's panels drawn from what was scraped during it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = ("#8c8c8c", "#dd8452", "#4c72b0", "#55a868")


def plot_replay(result: Mapping[str, Any], path: Path) -> None:
    """Draw, for each pass, the distribution of the time to first token, and where tokens came from."""
    figure, axes = plt.subplots(
        2, len(result["passes"]), figsize=(11, 7), layout="constrained", squeeze=False
    )
    for column, (name, variants) in enumerate(result["passes"].items()):
        for colour, (variant, every) in zip(COLOURS, result["answers"][name].items(), strict=False):
            times = sorted(one["ttft_s"] for one in every)
            shares = [(index + 1) / len(times) for index in range(len(times))]
            axes[0, column].step(times, shares, where="post", label=variant, color=colour)
        axes[0, column].set(
            title=f"{name}: requests answered", xlabel="seconds to first token", xscale="log", ylim=(0, 1)
        )
        axes[0, column].legend(loc="lower right", fontsize="small")
        axes[0, column].grid(True, alpha=0.3)
        left = [0.0] * len(variants)
        parts = (("from_paged_cache", "paged cache", "#c7c7c7"), ("from_tiers", "tiers", "#55a868"))
        for key, label, colour in (*parts, ("computed", "computed", "#c44e52")):
            widths = [one[key] for one in variants.values()]
            axes[1, column].barh(list(variants), widths, left=left, label=label, color=colour)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes[1, column].set(title=f"{name}: where tokens came from", xlabel="share", xlim=(0, 1))
        axes[1, column].invert_yaxis()
        axes[1, column].legend(loc="lower left", fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_dashboard(processes: Sequence[Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Draw panels of the dashboard from what a worker's metrics told, in one process after the other."""
    figure, axes = plt.subplots(3, 3, figsize=(14, 9), layout="constrained")
    figure.suptitle("dynamo_kvtc: is it compressing, is it faster, is anything wrong")
    panels: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
        ("Ratio (raw over stored bytes)", (("compression_ratio{}", "since start"),)),
        (
            "Bytes offloaded",
            (("offloaded_raw_bytes_total{}", "raw"), ("offloaded_stored_bytes_total{}", "stored")),
        ),
        (
            "Tokens",
            (
                ("lookup_tokens_total{}", "asked for"),
                ("lookup_hit_tokens_total{}", "held"),
                ("onboarded_tokens_total{}", "onboarded"),
            ),
        ),
        (
            "Seconds: onboarding against recomputing",
            (("recompute_avoided_seconds_total{}", "recompute avoided"), ("onboard_seconds{}", "onboarding")),
        ),
        ("Overlap (1 none, 2 perfect)", (("onboard_overlap{}", "overlap"),)),
        (
            "Speeds in tokens/s",
            (("prefill_tokens_per_second{}", "prefill"), ("decode_tokens_per_second{}", "decode")),
        ),
        (
            "Decisions",
            (
                ("decisions_total{onboard,onboard}", "onboard"),
                ("decisions_total{onboard,trim}", "trim"),
                ("decisions_total{onboard,recompute}", "recompute"),
                ("decisions_total{offload,compress}", "compress (tier blocks)"),
                ("decisions_total{offload,skip}", "skip (tier blocks)"),
            ),
        ),
        (
            "Bytes of the tiers",
            (("tier_stored_bytes{host0}", "host0"), ("tier_stored_bytes{disk1}", "disk1")),
        ),
        (
            "Dropped and missed tier blocks",
            (
                ("dropped_blocks_total{queue_full}", "dropped: queue full"),
                ("dropped_blocks_total{tier_full}", "dropped: tier full"),
                ("missed_blocks_total{missing}", "missed: evicted meanwhile"),
            ),
        ),
    )
    ends = list(accumulate(scrapes[-1]["seconds"] for scrapes in processes))
    for one, (title, series) in zip(axes.flat, panels, strict=True):
        for key, label in series:
            times, values = [], []
            for began, scrapes in zip([0.0, *ends], processes, strict=False):
                for each in scrapes:
                    value = each["values"].get(f"dynamo_kvtc_{key}")
                    if value is not None:
                        times.append(began + each["seconds"])
                        values.append(value)
                # Counters begin anew: no line between two processes.
                times.append(math.nan)
                values.append(math.nan)
            one.plot(times, values, label=label, marker=".", linewidth=1)
        for moment in ends[:-1]:
            one.axvline(moment, color="grey", linestyle=":", linewidth=1)
        one.set_title(title, fontsize="medium")
        one.set_ylim(bottom=0)
        one.grid(True, alpha=0.3)
        one.legend(fontsize="x-small")
    axes[-1, 1].set_xlabel("seconds since the start; dotted: the worker was restarted with its disk tier")
    figure.savefig(path, dpi=100)
    plt.close(figure)
