from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.simulation.measured import read_measured
from benchmarks.simulation.trace import TraceSettings, make_trace

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def test_a_seed_fixes_the_trace() -> None:
    assert make_trace(TraceSettings()) == make_trace(TraceSettings())
    assert make_trace(TraceSettings()) != make_trace(TraceSettings(seed=2))


def test_every_turn_goes_on_from_all_that_was_said() -> None:
    settings = TraceSettings(conversations=4, requests=40, document=(50, 60), question=(5, 9), answer=(3, 4))
    said: dict[int, list[int]] = {}
    for turn in make_trace(settings):
        before = said.get(turn.conversation)
        if before is None:
            assert turn.index == 0
            assert 55 <= len(turn.prompt) <= 69
        else:
            assert turn.prompt[: len(before)] == before
            assert 8 <= len(turn.prompt) - len(before) <= 13
        said[turn.conversation] = turn.prompt
    assert 1 < len(said) <= 4


def test_the_tier_is_sized_and_timed_by_committed_measurements() -> None:
    measured = read_measured(RESULTS)
    details = json.loads((RESULTS / "onboard_vs_recompute.json").read_text())["details"]
    assert measured.tokens == details["tokens"]
    # 30 layers, keys and values, 3 heads of 64 numbers of 2 bytes.
    assert measured.ratio == pytest.approx(details["tokens"] * 30 * 2 * 3 * 64 * 2 / details["stored_bytes"])
    assert 10 < measured.ratio < 40
    assert measured.onboard_speed > 1
    assert measured.encode_speed > 1
