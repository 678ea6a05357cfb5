"""The quality guard's states."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.policy.guard import GuardSettings, QualityGuard


def guard(levels: int = 3, **settings: float) -> QualityGuard:
    return QualityGuard(GuardSettings(**{"tolerance": 2.0, "samples": 4, **settings}), levels)  # type: ignore[arg-type]


def test_it_goes_gentler_step_by_step_and_stops_at_last() -> None:
    watched, states = guard(), []
    for _ in range(12):
        watched.checked(5.0)
        states.append(watched.state)
    assert states == ["ok"] * 3 + ["raised"] * 8 + ["stopped"]
    assert watched.stopped and watched.to_dict()["checks"] == {"good": 0, "drift": 12}
    assert not watched.checked(5.0) and watched.level == 3


def test_its_last_step_is_raw_where_there_is_raw() -> None:
    watched = QualityGuard(GuardSettings(tolerance=2.0, samples=1), 2, has_raw=True)
    states = []
    for _ in range(4):
        watched.checked(5.0)
        states.append(watched.state)
    assert states == ["raised", "raw", "raw", "raw"]
    assert not watched.stopped and watched.level == 2


def test_what_is_as_good_as_stated_changes_nothing() -> None:
    watched = guard()
    assert not any(watched.checked(1.5) for _ in range(100))
    assert watched.state == "ok"


def test_one_absurd_block_among_good_ones_is_no_drift() -> None:
    watched = guard(samples=32)
    for index in range(64):
        watched.checked(math.inf if index == 3 else 1.0)
    assert watched.state == "ok" and watched.checks == {"good": 63, "drift": 1}


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_stream_that_cannot_be_decoded_counts_as_drift(value: float) -> None:
    watched = guard(samples=1)
    assert watched.checked(value) and watched.state == "raised"


@given(st.floats(0, 1), st.integers(1, 500))
def test_the_share_is_kept(share: float, blocks: int) -> None:
    watched = guard(share=share)
    sampled = sum(watched.samples_next() for _ in range(blocks))
    assert abs(sampled - share * blocks) <= 1


def test_off_is_off() -> None:
    watched = guard(share=0.0)
    assert watched.state == "off" and not any(watched.samples_next() for _ in range(100))


@pytest.mark.parametrize("wrong", [{"share": 1.1}, {"tolerance": 0.5}, {"samples": 0}])
def test_senseless_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        guard(**wrong)
