"""The trace that `benchmarks.replay` serves."""

from __future__ import annotations

from itertools import pairwise

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
