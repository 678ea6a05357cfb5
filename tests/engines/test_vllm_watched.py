"""A running vLLM with the connector, as `dynamo-kvtc status`, `top` and Prometheus see it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs an environment with vLLM (make engine)")

from test_metric_names import asked_for, samples
from vllm_scenarios import LONG, TIER_BLOCK

HERE = Path(__file__).parent
HELD = LONG // TIER_BLOCK * TIER_BLOCK  # tokens of whole tier blocks


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "vllm_watched.py"), str(tmp_path_factory.mktemp("watched"))]
    env = {**os.environ, "PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    outcome: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return outcome


@pytest.mark.slow
def test_both_endpoints_say_the_same_once_the_engine_rests(watched: dict[str, Any]) -> None:
    own, host = samples(watched["own"]), samples(watched["host"])
    assert {key: host.get(key) for key in own} == own
    assert asked_for() <= {name for name, _ in own} | NOT_YET


#: Metrics of the dashboard that have no sample before something of their kind has happened.
NOT_YET = {"dynamo_kvtc_errors_total", "dynamo_kvtc_guard_error_ratio", "dynamo_kvtc_tier_not_admitted_total"}


@pytest.mark.slow
def test_status_shows_what_the_engine_did(watched: dict[str, Any]) -> None:
    counters = watched["json"]["counters"]
    assert counters["onboarded_tokens"] == HELD
    assert counters["offloaded_blocks"] >= HELD // TIER_BLOCK
    for part in ("host0", "disk1", f"{HELD:,} tokens in", "onboard 1", "prefill speed"):
        assert part in watched["status"], part
    assert "errors" in watched["status"] and not counters["errors"]


@pytest.mark.slow
def test_top_shows_it_while_it_happens(watched: dict[str, Any]) -> None:
    lines = watched["lines"]
    assert lines[0]["offloaded_tokens_per_s"] == 0
    assert sum(line["onboarded_tokens_per_s"] for line in lines) > 0
    assert any(line["hit_rate"] for line in lines)
    for part in ("Now", "tokens asked for", "Worker", "host0"):
        assert part in watched["top"], part
