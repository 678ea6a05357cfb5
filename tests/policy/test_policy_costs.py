"""Decisions by cost: what is slower than recomputing is refused, what is not known decides nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_kvtc.errors import ConfigError
from dynamo_kvtc.policy import CostPolicy, CostSettings, Piece, Speeds, estimate_onboard
from dynamo_kvtc.policy.speeds import Ewma

TOKENS = 256


def speeds(
    *, prefill: float | None = 1000.0, decode: float | None = 10_000.0, host: float = 1e9, disk: float = 1e6
) -> Speeds:
    values = {"prefill": prefill, "decode": decode, "overhead_s": 0.0, "read": {"host0": host, "disk1": disk}}
    return Speeds.from_dict(values | {"token_bytes": {"rd": 100.0}})


def pieces(*tiers: str, nbytes: int = 25_600) -> list[Piece]:
    return [Piece(TOKENS, nbytes, tier) for tier in tiers]


def test_without_measurements_everything_found_is_promised() -> None:
    policy = CostPolicy(Speeds())
    assert policy.prefix(pieces("disk1", "disk1")).blocks == 2


@pytest.mark.parametrize("missing", ["prefill", "decode", "read"])
def test_one_unknown_speed_is_enough_to_decide_nothing(missing: str) -> None:
    known = speeds(prefill=None if missing == "prefill" else 1.0, decode=None if missing == "decode" else 1.0)
    decision = CostPolicy(known).prefix(pieces("other" if missing == "read" else "disk1"))
    assert (decision.blocks, decision.action, decision.estimate) == (1, "onboard", None)


def test_a_fast_tier_is_onboarded_and_a_slow_one_recomputed() -> None:
    assert CostPolicy(speeds()).prefix(pieces("host0", "host0")).action == "onboard"
    slow = CostPolicy(speeds(disk=1e3)).prefix(pieces("disk1", "disk1"))
    assert (slow.blocks, slow.action) == (0, "recompute")
    assert slow.estimate is not None and slow.estimate.onboard_s > slow.estimate.recompute_s


def test_a_prefix_whose_end_lies_in_a_slow_tier_is_trimmed() -> None:
    decision = CostPolicy(speeds(disk=1e3)).prefix(pieces("host0", "host0", "disk1"))
    assert (decision.blocks, decision.action) == (2, "trim")


def test_what_overlaps_counts_once() -> None:
    (one,) = estimate_onboard(pieces("disk1"), speeds(disk=25_600.0, decode=512.0)) or []
    assert one.transfer_s == pytest.approx(1.0)
    assert one.decode_s == pytest.approx(0.5)
    assert one.onboard_s == pytest.approx(1.0)


def test_after_a_refusal_onboarding_must_be_clearly_faster() -> None:
    known = speeds(disk=1e3)
    policy = CostPolicy(known, CostSettings(hysteresis=0.5))
    assert policy.prefix(pieces("disk1")).action == "recompute"
    # Recomputing takes 256 ms; now reading takes 200 ms, which is not faster by half.
    policy.speeds = speeds(disk=128_000.0)
    assert policy.prefix(pieces("disk1")).action == "recompute"
    policy.speeds = speeds(disk=256_000.0)
    assert policy.prefix(pieces("disk1")).action == "onboard"
    policy.speeds = speeds(disk=128_000.0)
    assert policy.prefix(pieces("disk1")).action == "onboard"


def test_refusals_are_probed_so_that_costs_go_on_being_measured() -> None:
    policy = CostPolicy(speeds(disk=1e3), CostSettings(probe_every=3))
    actions = [policy.prefix(pieces("disk1")).action for _ in range(6)]
    assert actions == ["recompute", "recompute", "probe"] * 2


def test_decisions_by_cost_can_be_turned_off() -> None:
    policy = CostPolicy(speeds(disk=1.0), CostSettings(enabled=False))
    assert policy.prefix(pieces("disk1")).action == "onboard"


@given(
    st.lists(st.sampled_from(["host0", "disk1"]), min_size=1, max_size=12),
    st.floats(1, 1e9),
    st.floats(1, 1e9),
    st.floats(1, 1e6),
    st.floats(1, 1e6),
)
def test_what_is_promised_is_never_expected_to_be_slower(
    tiers: list[str], host: float, disk: float, prefill: float, decode: float
) -> None:
    known = speeds(prefill=prefill, decode=decode, host=host, disk=disk)
    decision = CostPolicy(known).prefix(pieces(*tiers))
    estimates = estimate_onboard(pieces(*tiers), known)
    assert estimates is not None
    if decision.blocks:
        chosen = estimates[decision.blocks - 1]
        assert chosen.onboard_s < chosen.recompute_s
        saved = [one.recompute_s - one.onboard_s for one in estimates]
        assert saved[decision.blocks - 1] == max(saved)
    else:
        assert all(one.onboard_s >= one.recompute_s for one in estimates)


def test_a_measured_prefill_speed_goes_before_the_configured_one() -> None:
    known = Speeds(configured_prefill=5.0)
    assert known.prefill == 5.0
    known.prefilled(1000, 2.0)
    assert known.prefill == 500.0


def test_a_tier_that_becomes_slow_is_seen_at_once() -> None:
    known = Speeds()
    known.read("disk1", 10**10, 1.0)
    known.read("disk1", 10**6, 1.0)
    assert known.read_speed("disk1") == pytest.approx(2e6, rel=1e-3)
    for _ in range(20):
        known.read("disk1", 10**6, 1.0)
    assert known.read_speed("disk1") == pytest.approx(1e6, rel=0.1)


@given(st.lists(st.tuples(st.floats(1, 1e6), st.floats(1e-3, 1e3)), min_size=1, max_size=5))
def test_the_first_speeds_add_up_in_time(passes: list[tuple[float, float]]) -> None:
    """As long as the mean is a plain one: the time per unit is the mean of the times per unit."""
    mean = Ewma()
    for amount, seconds in passes:
        mean.observe_speed(amount, seconds)
    paces = [seconds / amount for amount, seconds in passes]
    assert mean.value is not None and 1 / mean.value == pytest.approx(sum(paces) / len(paces))


def test_impossible_measurements_are_left_out() -> None:
    known = Speeds()
    known.prefilled(0, 1.0)
    known.read("disk1", 100, 0.0)
    known.onboarded(0, wall_s=0.0, transfer_s=0.0, decode_s=0.0)
    assert (known.prefill, known.read_speed("disk1"), known.decode) == (None, None, None)


def test_speeds_travel_in_a_status() -> None:
    known = speeds()
    assert Speeds.from_dict(known.to_dict()).to_dict() == known.to_dict()
    assert Speeds.from_dict(Speeds().to_dict()).to_dict() == Speeds().to_dict()


@given(st.lists(st.floats(1, 1e6), min_size=1))
def test_a_smoothed_value_lies_within_what_was_observed(values: list[float]) -> None:
    mean = Ewma()
    for value in values:
        mean.observe(value)
    assert mean.value is not None and min(values) * (1 - 1e-9) <= mean.value <= max(values) * (1 + 1e-9)


@pytest.mark.parametrize("settings", [{"hysteresis": -0.1}, {"probe_every": 0}])
def test_senseless_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        CostSettings(**settings)  # type: ignore[arg-type]
