"""``dynamo-kvtc top``: what a running worker is doing now, in a terminal."""

from __future__ import annotations

import json as json_module
import time
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live

from dynamo_kvtc.cli.output import JsonFlag, format_rate, make_table, print_line
from dynamo_kvtc.cli.status import TIER_COLUMNS, overview_rows, tier_rows
from dynamo_kvtc.cli.worker import DEFAULT_URL, UrlOption, fetch_status

__all__ = ["command", "rates"]

_RATES = (
    *("looked_up_tokens", "found_tokens", "offloaded_tokens", "offloaded_raw_bytes"),
    *("offloaded_stored_bytes", "onboarded_tokens", "onboarded_raw_bytes", "onboarded_stored_bytes"),
    "recompute_avoided_seconds",
)


def command(
    url: UrlOption = DEFAULT_URL,
    interval: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.1, max=3600)] = 2.0,
    count: Annotated[int, typer.Option(help="Stop after so many looks; 0 goes on.", min=0)] = 0,
    json: JsonFlag = False,
) -> None:
    """Show what a running worker is doing now, until it is interrupted."""
    before, since = fetch_status(url), time.monotonic()
    looks = 0
    # A person sees the last picture stay; a pipe gets one JSON object a line.
    live = None if json else Live(console=Console(), auto_refresh=False)
    try:
        if live is not None:
            live.start()
        while not count or looks < count:
            time.sleep(interval)
            status, now = fetch_status(url), time.monotonic()
            found = rates(before, status, now - since)
            if live is None:
                print_line(json_module.dumps(found))
            else:
                live.update(_picture(status, found), refresh=True)
            before, since, looks = status, now, looks + 1
    except KeyboardInterrupt:
        pass
    finally:
        if live is not None:
            live.stop()


def rates(before: Mapping[str, Any], after: Mapping[str, Any], seconds: float) -> dict[str, float | None]:
    """Return what happened between two statuses, by the second.

    A worker that started anew in between has smaller counters; its own are taken then.
    """
    old, new = before["counters"], after["counters"]
    if new["lookups"] < old["lookups"] or new["offloaded_blocks"] < old["offloaded_blocks"]:
        old = dict.fromkeys(_RATES, 0) | {"onboard_seconds": {"sum": 0.0}}
    gained = {name: new[name] - old[name] for name in _RATES}
    onboarding = new["onboard_seconds"]["sum"] - old["onboard_seconds"]["sum"]
    return {
        **{f"{name}_per_s": amount / seconds for name, amount in gained.items()},
        "ratio": _quotient(gained["offloaded_raw_bytes"], gained["offloaded_stored_bytes"]),
        "hit_rate": _quotient(gained["found_tokens"], gained["looked_up_tokens"]),
        "times_faster": _quotient(gained["recompute_avoided_seconds"], onboarding),
    }


def _quotient(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _picture(status: Mapping[str, Any], found: Mapping[str, float | None]) -> Group:
    def number(name: str, unit: str = "", digits: int = 0) -> str:
        value = found[name]
        return "-" if value is None else f"{value:,.{digits}f}{unit}"

    now = [
        ("tokens asked for", number("looked_up_tokens_per_s", "/s")),
        ("hit rate", "-" if found["hit_rate"] is None else f"{found['hit_rate']:.0%}"),
        ("tokens onboarded", number("onboarded_tokens_per_s", "/s")),
        ("against recomputing", number("times_faster", "x faster", 1)),
        ("tokens offloaded", number("offloaded_tokens_per_s", "/s")),
        ("stored", format_rate(found["offloaded_stored_bytes_per_s"] or 0.0)),
        ("ratio", number("ratio", "x", 1)),
    ]
    return Group(
        make_table("Now", ("what", "rate"), now),
        make_table("Worker", ("what", "since the start"), overview_rows(status)),
        make_table("Tiers", TIER_COLUMNS, tier_rows(status)),
    )
