"""``dynamo-kvtc status``: what a running worker has done since its start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynamo_kvtc.cli.output import JsonFlag, format_bytes, format_seconds, make_table, print_json, print_table
from dynamo_kvtc.cli.worker import DEFAULT_URL, UrlOption, fetch_status

__all__ = ["command", "overview_rows", "tier_rows"]

#: Columns of the tiers' table.
TIER_COLUMNS = ("tier", "objects", "stored", "of", "hits", "asked", "written", "read", "evicted", "refused")


def command(url: UrlOption = DEFAULT_URL, json: JsonFlag = False) -> None:
    """Show what a running worker has done since its start."""
    status = fetch_status(url)
    if json:
        print_json(status)
        return
    print_table(make_table("Worker", ("what", "since the start"), overview_rows(status)))
    print_table(make_table("Tiers", TIER_COLUMNS, tier_rows(status)))


def overview_rows(status: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the answers to: is it compressing, is it faster, is anything wrong."""
    counters, artifact, speeds = status["counters"], status.get("artifact", {}), status.get("speeds", {})
    onboarding, avoided = counters["onboard_seconds"]["sum"], counters["recompute_avoided_seconds"]
    rows = [
        (
            "encodes with",
            f"{artifact.get('profile') or '-'} {artifact.get('plan') or ''} ({artifact.get('id', '')[:12]})",
        ),
        ("ratio", "-" if counters["offload_ratio"] is None else f"{counters['offload_ratio']:.1f}x"),
        (
            "offloaded",
            f"{counters['offloaded_tokens']:,} tokens, {format_bytes(counters['offloaded_raw_bytes'])} as "
            f"{format_bytes(counters['offloaded_stored_bytes'])}",
        ),
        ("found", _share(counters["found_tokens"], counters["looked_up_tokens"], "tokens asked for")),
        ("onboarded", f"{counters['onboarded_tokens']:,} tokens in {format_seconds(onboarding)}"),
        ("recompute avoided", f"{format_seconds(avoided)}" if avoided else "- (prefill speed not known)"),
        ("overlap", "-" if counters["overlap"] is None else f"{counters['overlap']:.2f} (1 none, 2 perfect)"),
        ("prefill speed", f"{speeds['prefill']:,.0f} tokens/s" if speeds.get("prefill") else "-"),
        ("waiting", f"{status.get('offloads_pending', 0)} of {status.get('offload_queue_limit', 0)}"),
        *((f"decisions at {step}", _reasons(actions)) for step, actions in counters["decisions"].items()),
        ("stored with", _reasons(counters.get("encoded_blocks", {}))),
        ("dropped", _reasons(counters["dropped_blocks"])),
        ("missed", _reasons(counters["missed_blocks"])),
        ("errors", _reasons(counters["errors"])),
    ]
    guard = status.get("guard")
    if guard:
        now = f", encodes with {guard['encodes_with']}" if "encodes_with" in guard else ""
        rows.append(("quality guard", f"{guard['state']}, {sum(guard['checks'].values())} checks{now}"))
    return rows


def tier_rows(status: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return one row for each tier, from fast to slow."""
    return [
        (
            name,
            f"{tier['objects']:,}",
            format_bytes(tier["stored_bytes"]),
            format_bytes(tier["capacity_bytes"]),
            f"{tier['hits']:,}",
            f"{tier['lookups']:,}",
            format_bytes(tier["bytes_written"]),
            format_bytes(tier["bytes_read"]),
            f"{tier['evictions']:,}",
            f"{tier['rejected_full'] + sum(tier.get('not_admitted', {}).values()):,}",
        )
        for name, tier in status["tiers"].items()
    ]


def _share(part: int, whole: int, of: str) -> str:
    return f"{part:,} of {whole:,} {of}" + (f" ({part / whole:.0%})" if whole else "")


def _reasons(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items() if count) or "none"
