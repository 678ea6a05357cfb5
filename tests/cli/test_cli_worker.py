"""Commands that look at a running worker, through its real endpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from typer.testing import CliRunner

from dynamo_kvtc.cli.app import app
from dynamo_kvtc.cli.top import rates
from dynamo_kvtc.observability import Counters, MetricsEndpoint

TIER = {
    **dict.fromkeys(("objects", "stored_bytes", "capacity_bytes", "hits", "lookups", "bytes_written"), 1024),
    **dict.fromkeys(("bytes_read", "evictions", "rejected_full"), 3),
}
SPEEDS = {"prefill": 1000.0, "decode": 20_000.0, "overhead_s": 0.001, "encode": {"rd": 1e4}}
SPEEDS |= {"read": {"host0": 1e9, "disk1": 1e3}, "token_bytes": {"rd": 100.0}}


def status(counters: Counters) -> dict[str, object]:
    return {
        "version": "0.1.0",
        "artifact": {"id": "ab" * 32, "profile": "rd", "plan": "ratio=20"},
        "counters": counters.snapshot().to_dict(),
        "tiers": {"host0": TIER},
        "speeds": SPEEDS,
        "policy": {"tier_block_tokens": 256, "recent_window": 128, "minimum_tokens": 512, "enabled": True},
    }


@pytest.fixture
def counters() -> Counters:
    counted = Counters()
    counted.looked_up(8, 6, 2048, 1536)
    counted.offloaded(2, 512, 3000, 200)
    counted.dropped("queue_full", 3)
    counted.decided("offload", "compress", 7)
    counted.decided("onboard", "trim", 2)
    return counted


@pytest.fixture
def url(counters: Counters) -> Iterator[str]:
    endpoint = MetricsEndpoint(lambda: status(counters))
    yield f"http://127.0.0.1:{endpoint.port}"
    endpoint.close()


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result.output


def test_status_shows_the_worker_and_its_tiers(url: str) -> None:
    shown = run("status", "--url", url)
    for part in ("15.0x", "1,536 of 2,048", "queue_full 3", "host0", "rd ratio=20", "compress 7", "trim 2"):
        assert part in shown
    assert json.loads(run("status", "--url", url, "--json"))["tiers"]["host0"] == TIER


def test_top_shows_rates(url: str) -> None:
    assert "tokens onboarded" in run("top", "--url", url, "--interval", "0.1", "--count", "1")
    lines = run("top", "--url", url, "--interval", "0.1", "--count", "2", "--json").splitlines()
    assert [json.loads(line)["ratio"] for line in lines] == [None, None]


def test_rates_come_from_the_difference_and_survive_a_restart(counters: Counters) -> None:
    before = status(counters)
    counters.offloaded(1, 100, 1000, 100)
    after = status(counters)
    assert rates(before, after, 2.0)["offloaded_tokens_per_s"] == 50
    assert rates(before, after, 2.0)["ratio"] == 10
    fresh = Counters()
    fresh.offloaded(1, 100, 1000, 100)
    assert rates(after, status(fresh), 2.0)["offloaded_tokens_per_s"] == 50


def test_explain_tells_costs_and_decision(url: str) -> None:
    shown = json.loads(run("explain", "--tokens", "2000", "--url", url, "--json"))
    assert (shown["tier_blocks"], shown["unknown"]) == (7, [])
    actions = {one["tier"]: one["action"] for one in shown["candidates"]}
    assert actions == {"host0": "onboard", "disk1": "recompute"}
    table = run("explain", "--tokens", "2000", "--url", url)
    assert "recompute" in table and "208 are left to the engine" in table


def test_explain_tells_what_it_would_be_stored_with() -> None:
    given = ("--prefill", "1000", "--decode", "1e5", "--read", "disk0=1e7", "--token-bytes", "raw=1e5")
    plans = ("--token-bytes", "rd ratio=80=1250", "--token-bytes", "rd ratio=20=5000")
    shown = json.loads(run("explain", "--tokens", "2000", *given, *plans, "--json"))["store"]
    assert (shown["action"], shown["encoder"]) == ("coarser", "rd ratio=80")
    assert [one["encoder"] for one in shown["candidates"]] == ["rd ratio=20", "rd ratio=80", "raw"]
    assert shown["candidates"][0]["expected_s"] > shown["candidates"][1]["expected_s"]
    assert "coarser" in run("explain", "--tokens", "2000", *given, *plans)
    slow = run("explain", "--tokens", "2000", *given[:-3], "disk0=1e4", *plans)
    assert "It is not stored" in slow


def test_explain_works_without_a_worker_and_says_what_it_lacks() -> None:
    assert "shorter than minimum_tokens" in run("explain", "--tokens", "100")
    assert "Not known yet: prefill" in run("explain", "--tokens", "2000")
    given = ("--prefill", "1000", "--decode", "1e5", "--read", "disk0=1e9", "--token-bytes", "raw=1e5")
    shown = json.loads(run("explain", "--tokens", "2000", *given, "--json"))
    assert shown["candidates"][0]["action"] == "onboard"


def test_what_cannot_be_reached_or_read_is_an_error_that_says_so(url: str) -> None:
    assert "no worker answers" in run("status", "--url", "http://127.0.0.1:1", code=1)
    assert "begins with http" in run("status", "--url", "localhost", code=1)
    assert "404" in run("status", "--url", f"{url}/other", code=1)
    run("explain", "--tokens", "2000", "--read", "disk0", code=2)
