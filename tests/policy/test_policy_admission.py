"""What may be written to a disk that wears."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.policy.admission import Admission, FrequencySketch, TokenBucket


def key(number: int) -> bytes:
    return hashlib.blake2b(number.to_bytes(8, "little"), digest_size=32).digest()


@given(st.lists(st.integers(0, 40), max_size=200))
def test_a_sketch_never_counts_too_low(seen: list[int]) -> None:
    sketch = FrequencySketch(64)
    for number in seen:
        sketch.see(key(number))
    assert all(sketch.count(key(number)) >= min(15, seen.count(number)) for number in set(seen))


def test_a_sketch_forgets() -> None:
    sketch = FrequencySketch(64)
    for _ in range(15):
        sketch.see(key(0))
    for number in range(1, 8 * 64):
        sketch.see(key(number % 3 + 1))
    assert sketch.count(key(0)) <= 8


@given(st.lists(st.tuples(st.floats(0, 7200), st.integers(1, 5000)), max_size=60))
def test_no_more_is_written_than_the_budget_gives(steps: list[tuple[float, int]]) -> None:
    now, written, largest = 0.0, 0, 0
    bucket = TokenBucket(24_000, clock=lambda: now)
    for pause, nbytes in steps:
        now += pause
        if bucket.take(nbytes):
            written, largest = written + nbytes, max(largest, nbytes)
    assert written <= 1000 + now * 24_000 / 86_400 + largest + 1e-6


def test_what_is_asked_for_often_enough_is_admitted() -> None:
    gate = Admission(admit_after=2)
    for expected in (False, False, True):
        assert gate.admits(key(1), 10) is expected
        gate.see([key(1)])
    assert gate.refused == {"frequency": 2, "budget": 0}


def test_without_settings_everything_is_admitted() -> None:
    assert all(Admission().admits(key(number), 1 << 30) for number in range(10))


def test_a_spent_budget_refuses_and_refills() -> None:
    now = 0.0
    gate = Admission(bytes_per_day=24_000, clock=lambda: now)
    assert gate.admits(key(1), 1000) and not gate.admits(key(2), 1000)
    now = 3600.0
    assert gate.admits(key(2), 1000)
    assert gate.refused == {"frequency": 0, "budget": 1}


def test_senseless_settings_are_refused() -> None:
    for make in (lambda: Admission(16), lambda: TokenBucket(0), lambda: FrequencySketch(0)):
        with pytest.raises(ConfigError):
            make()
