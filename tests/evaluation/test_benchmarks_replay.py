"""The trace that `benchmarks.replay` serves."""

from __future__ import annotations

from itertools import pairwise

from benchmarks.replay.summary import summarise
from benchmarks.replay.trace import TraceSettings, make_trace

SETTINGS = TraceSettings(conversations=3, turns=4, shared=8, first=16, growth=5, seed=7)
CORPUS = range(1000)


def test_a_seed_gives_one_trace() -> None:
    assert make_trace(CORPUS, SETTINGS) == make_trace(CORPUS, SETTINGS)
    assert make_trace(CORPUS, SETTINGS) != make_trace(CORPUS, TraceSettings(3, 4, 8, 16, 5, seed=8))


def test_turns_keep_their_order_and_each_goes_on_from_the_last() -> None:
    trace = make_trace(CORPUS, SETTINGS)
    assert len(trace) == 12
    for conversation in range(3):
        turns = [turn for turn in trace if turn.conversation == conversation]
        assert [turn.turn for turn in turns] == [0, 1, 2, 3]
        for before, after in pairwise(turns):
            assert after.token_ids[: len(before.token_ids)] == before.token_ids
            assert len(after.token_ids) == len(before.token_ids) + 5


def test_all_conversations_share_their_beginning() -> None:
    assert len({turn.token_ids[:8] for turn in make_trace(CORPUS, SETTINGS)}) == 1


def _answers(*ttft_s: float) -> dict[str, object]:
    answers = [
        {
            "ttft_s": seconds,
            "in_cache": 1,
            "onboarded": 2,
            "computed": 1,
            "first_token": 5,
            "offload_s": 1.0,
        }
        for seconds in ttft_s
    ]
    return {"answers": answers, "status": None, "scrapes": []}


def test_ratios_are_of_percentiles_and_of_the_means_of_repetitions() -> None:
    first = {"recompute": _answers(4.0, 8.0), "no tier": _answers(2.0, 4.0)}
    second = {"recompute": _answers(3.0, 9.0), "no tier": _answers(3.0, 9.0)}
    found = summarise([{"cold": first, "warm": first}, {"cold": second, "warm": second}])["cold"]["no tier"]
    assert found["requests"] == 4
    assert found["ttft_s"]["p50"] == 4.0
    assert found["recompute_over_this"]["p50"] == 8.0 / 4.0
    assert found["recompute_over_this"]["mean"] == 24.0 / 18.0
    assert (found["recompute_over_this"]["mean_least"], found["recompute_over_this"]["mean_most"]) == (1, 2)
    assert found["recompute_over_this_with_offload"] == 24.0 / 22.0
    assert (found["from_paged_cache"], found["from_tiers"], found["computed"]) == (0.25, 0.5, 0.25)
    assert found["same_first_token"] == 1
