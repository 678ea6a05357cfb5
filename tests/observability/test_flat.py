"""Flat values: every number of a status under one key, and their changes add up to it again."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_kvtc.observability import SEPARATOR, Changes, Counters, flat_series, flat_values


def status(counters: Counters, fill: int) -> dict[str, object]:
    return {"counters": counters.snapshot().to_dict(), "tiers": {"host0": {"stored_bytes": fill}}}


def test_every_key_belongs_to_a_series_of_the_reference() -> None:
    counters = Counters()
    counters.onboard_ended("complete", seconds=0.3, first_layer_s=0.1, transfer_s=0.2, decode_s=0.2)
    counters.offloaded(blocks=1, tokens=256, raw_bytes=1000, stored_bytes=50)
    labels = {series.name: series.labels for series in flat_series()}
    values = flat_values(status(counters, 7))
    for key in values:
        name, *found = key.split(SEPARATOR)
        assert len(found) == len(labels[name])
    assert values["onboard_seconds_bucket|0.25"] == 0 and values["onboard_seconds_bucket|0.5"] == 1
    assert (values["onboard_seconds_count"], values["onboard_seconds_sum"]) == (1, 0.3)
    assert values["tier_stored_bytes|host0"] == 7


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1000), st.floats(0, 60), st.integers(0, 9)), max_size=6))
def test_changes_add_up(steps: list[tuple[int, float, int]]) -> None:
    counters, changes = Counters(), Changes()
    sums: dict[str, float] = {}
    for tokens, seconds, fill in steps:
        counters.offloaded(blocks=1, tokens=tokens, raw_bytes=tokens * 20, stored_bytes=tokens)
        counters.onboard_ended(
            "complete", seconds=seconds, first_layer_s=None, transfer_s=seconds, decode_s=seconds
        )
        grown, now = changes.take(status(counters, fill))
        for key, value in grown.items():
            sums[key] = sums.get(key, 0) + value
        sums.update(now)
        expected = flat_values(status(counters, fill))
        assert sums.keys() == expected.keys()
        assert all(abs(sums[key] - value) < 1e-6 for key, value in expected.items())
        assert changes.take(status(counters, fill)) == ({}, {})
