"""A short seeded run of every fuzz target; ``make fuzz`` makes the long one."""

from __future__ import annotations

import pytest

from benchmarks.fuzz.run import TARGETS, replay, run_batches
from benchmarks.fuzz.target import Violation

#: Cases of the short run, by what they cost.
_CASES = {"stream": 20_000, "segment": 4_000, "payload": 600, "artifact": 500, "config": 300, "folder": 300}


@pytest.mark.parametrize("name", TARGETS)
def test_mutated_input_is_refused_or_sound(name: str) -> None:
    tally = run_batches(TARGETS[name](), 7, range(4), size=_CASES[name] // 4)
    assert tally.findings == []
    assert tally.cases == _CASES[name]
    assert tally.traced and tally.memory_share <= 1
    assert len(tally.outcomes) > 1


def test_a_reader_that_accepts_damage_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fuzzer itself: with the comparison of chunk checksums gone, damage is read as data."""
    from benchmarks.fuzz import streams
    from dynamo_kvtc.codec import bitstream

    class Equal(int):
        def __eq__(self, other: object) -> bool:
            return True

        def __ne__(self, other: object) -> bool:
            return False

        __hash__ = int.__hash__

    target = streams.StreamTarget()
    monkeypatch.setattr(bitstream.xxhash, "xxh3_64_intdigest", lambda data: Equal())
    tally = run_batches(target, 7, range(1))
    assert any("read as another one" in finding for finding in tally.findings)
    monkeypatch.undo()
    # The same case is refused by the reader as it is.
    place = tally.findings[0].split(":")[0]
    try:
        assert replay(place) != "FINDING"
    except Violation:
        pytest.fail("the case is a finding without the broken reader, too")
