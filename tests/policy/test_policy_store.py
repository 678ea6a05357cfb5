"""What sequences are stored with: never what is slower than recomputing, raw only where clearly faster."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_kvtc.policy import Candidate, CostSettings, Speeds, StorePolicy

TIERS = ("host0", "disk1")
PLANS = [
    Candidate("rd ratio=20", 5_000.0, TIERS),
    Candidate("rd ratio=40", 2_500.0, TIERS, "coarser"),
    Candidate("rd ratio=80", 1_250.0, TIERS, "coarser"),
]
RAW = Candidate("raw", 100_000.0, TIERS, "raw")
TOKENS = 4096


def speeds(
    *,
    prefill: float | None = 1e3,
    decode: float | None = 1e5,
    host: float | None = 1e10,
    disk: float | None = 1e9,
    overhead_s: float = 0.0,
    found: dict[str, float] | None = None,
) -> Speeds:
    read = {name: value for name, value in (("host0", host), ("disk1", disk)) if value is not None}
    values = {"prefill": prefill, "decode": decode, "overhead_s": overhead_s, "read": read}
    return Speeds.from_dict(values | {"found": found or {}})


def policy(known: Speeds, **settings: float) -> StorePolicy:
    return StorePolicy(known, CostSettings(**settings))  # type: ignore[arg-type]


def test_where_decoding_is_what_takes_time_quality_is_not_paid() -> None:
    decision = policy(speeds()).decide(TOKENS, PLANS, TIERS)
    assert (decision.action, decision.candidate) == ("compress", PLANS[0])
    assert len(decision.costs) == 3


def test_where_the_tier_is_what_takes_time_a_coarser_plan_is_taken() -> None:
    slow = speeds(host=1e7, disk=1e7, decode=1e5)
    decision = policy(slow).decide(TOKENS, PLANS, TIERS)
    # 250 us a token at ratio 40 and 125 at 80: the coarsest, since it is faster by more than half the margin.
    assert (decision.action, decision.candidate) == ("coarser", PLANS[2])
    # From 10 us a token on decoding takes as long as the transfer; ratio 40 is as fast as 80 then.
    middle = policy(speeds(host=2.5e8, disk=2.5e8)).decide(TOKENS, PLANS, TIERS)
    assert middle.candidate == PLANS[1]


def test_raw_is_chosen_where_copying_is_clearly_faster_than_decoding() -> None:
    fast = speeds(host=1e11, disk=1e11, decode=1e5)
    assert policy(fast).decide(TOKENS, [*PLANS, RAW], TIERS).action == "raw"
    assert policy(fast).decide(TOKENS, PLANS, TIERS).action == "compress"
    assert policy(speeds(host=1e9, disk=1e9)).decide(TOKENS, [*PLANS, RAW], TIERS).action == "compress"


def test_what_a_tier_would_not_hold_must_be_recomputed() -> None:
    fast = {"host": 1e11, "disk": 1e10, "decode": 1e5}
    shallow = Candidate("raw", 100_000.0, TIERS[:1], "raw")
    often_in_memory = speeds(**fast, found={"host0": 1.0, "disk1": 0.0}, prefill=2e4)
    mostly_on_disk = speeds(**fast, found={"host0": 0.1, "disk1": 0.9}, prefill=2e4)
    assert policy(often_in_memory).decide(TOKENS, [PLANS[0], shallow], TIERS).action == "raw"
    assert policy(mostly_on_disk).decide(TOKENS, [PLANS[0], shallow], TIERS).action == "compress"


def test_without_measurements_the_configured_plan_is_used() -> None:
    for known in (speeds(prefill=None), speeds(decode=None), speeds(host=None)):
        decision = policy(known).decide(TOKENS, [*PLANS, RAW], TIERS)
        assert (decision.action, decision.candidate, decision.costs) == ("compress", PLANS[0], ())
    # A slower tier that nothing was read from yet decides nothing.
    assert policy(speeds(disk=None)).decide(TOKENS, PLANS, TIERS).costs
    disabled = StorePolicy(speeds(host=1.0, disk=1.0), CostSettings(enabled=False))
    assert disabled.decide(TOKENS, PLANS, TIERS).action == "compress"


def test_a_tier_that_nothing_was_found_in_lately_keeps_a_small_share() -> None:
    known = Speeds()
    known.found(["host0", "host0"])
    assert known.shares(TIERS) == pytest.approx({"host0": 0.95, "disk1": 0.05})
    assert Speeds().shares(TIERS) == {"host0": 0.5, "disk1": 0.5}


def test_nothing_is_stored_where_nothing_may_be() -> None:
    assert policy(speeds()).decide(TOKENS, [], TIERS).action == "skip"


def test_what_could_not_be_given_back_in_time_is_skipped_and_probed() -> None:
    chooser = policy(speeds(host=1e5, disk=1e5, prefill=1e6), probe_every=3)
    actions = [chooser.decide(TOKENS, PLANS, TIERS).action for _ in range(6)]
    assert actions == ["skip", "skip", "probe"] * 2


def test_raw_that_was_never_decoded_counts_as_free_until_it_was() -> None:
    known = speeds(host=1e11, disk=1e11)
    known.onboarded(1000, wall_s=0.01, transfer_s=0.0, decode_s=0.01, encoder="rd ratio=20")
    assert policy(known).decide(TOKENS, [*PLANS, RAW], TIERS).action == "raw"
    known.onboarded(1000, wall_s=0.02, transfer_s=0.0, decode_s=0.02, encoder="raw")
    assert policy(known).decide(TOKENS, [*PLANS, RAW], TIERS).action == "compress"
    assert known.decode_speed("rd ratio=80") == known.decode_speed("rd ratio=20")


speed = st.floats(1e3, 1e13)


@given(
    host=speed,
    disk=speed,
    decode=st.floats(1, 1e8),
    prefill=st.floats(1, 1e8),
    overhead_s=st.floats(0, 10),
    share=st.floats(0, 1),
    tokens=st.integers(1, 1 << 20),
    raw=st.booleans(),
    hysteresis=st.floats(0, 2),
)
def test_what_is_stored_is_never_expected_to_be_slower_than_recomputing(
    host: float,
    disk: float,
    decode: float,
    prefill: float,
    overhead_s: float,
    share: float,
    tokens: int,
    raw: bool,
    hysteresis: float,
) -> None:
    known = speeds(
        prefill=prefill,
        decode=decode,
        host=host,
        disk=disk,
        overhead_s=overhead_s,
        found={"host0": share, "disk1": 1 - share},
    )
    candidates = [*PLANS, RAW] if raw else PLANS
    decision = policy(known, hysteresis=hysteresis, probe_every=1 << 30).decide(tokens, candidates, TIERS)
    costs = dict(zip([one.encoder for one in candidates], decision.costs, strict=True))
    if decision.candidate is None:
        assert decision.action == "skip"
        assert all(cost.onboard_s >= cost.recompute_s for cost in costs.values())
        return
    chosen = costs[decision.candidate.encoder]
    assert decision.action == decision.candidate.action
    assert chosen.onboard_s < chosen.recompute_s
    assert raw or decision.action != "raw"
    worth = [costs[one.encoder] for one in PLANS if costs[one.encoder].onboard_s < chosen.recompute_s]
    if not worth:
        return
    fastest = min(cost.expected_s for cost in worth)
    if decision.action == "raw":
        assert chosen.expected_s * (1 + hysteresis) < fastest * (1 + hysteresis / 2) * (1 + 1e-9)
    else:
        assert chosen.expected_s <= fastest * (1 + hysteresis / 2)


@given(bandwidths=st.lists(speed, min_size=2, max_size=6), raw=st.booleans(), overhead_s=st.floats(0, 1))
def test_faster_tiers_never_make_it_store_less_exactly(
    bandwidths: list[float], raw: bool, overhead_s: float
) -> None:
    """One tier, plans that decode equally fast, no history."""
    stored = []
    for bandwidth in sorted(bandwidths):
        known = speeds(host=bandwidth, disk=None, prefill=1.0, overhead_s=overhead_s)
        candidates = [Candidate(one.encoder, one.token_bytes, TIERS[:1], one.action) for one in [*PLANS, RAW]]
        decision = policy(known).decide(TOKENS, candidates if raw else candidates[:-1], TIERS[:1])
        stored.append(decision.candidate.token_bytes if decision.candidate else 0.0)
    assert stored == sorted(stored)


@given(
    start=st.floats(1e6, 1e12),
    noise=st.lists(st.floats(0.97, 1.03), min_size=8, max_size=40),
    raw=st.booleans(),
)
def test_noise_does_not_turn_the_choice_over_again_and_again(
    start: float, noise: list[float], raw: bool
) -> None:
    """Whatever the speed is, three per cent of noise change the choice at most once."""
    chooser = policy(speeds(prefill=1.0), hysteresis=0.2)
    chosen = []
    for factor in noise:
        chooser.speeds = speeds(host=start * factor, disk=None, prefill=1.0)
        decision = chooser.decide(TOKENS, [*PLANS, RAW] if raw else PLANS, TIERS[:1])
        assert decision.candidate is not None
        chosen.append(decision.candidate.encoder)
    changes = sum(one != other for one, other in pairwise(chosen))
    assert changes <= 1


@given(st.lists(st.lists(st.sampled_from(TIERS), min_size=1, max_size=4), max_size=20))
def test_shares_are_shares(lookups: list[list[str]]) -> None:
    known = Speeds()
    for tiers in lookups:
        known.found(tiers)
    shares = known.shares(TIERS)
    assert abs(sum(shares.values()) - 1) < 1e-9 and all(share >= 0.05 - 1e-9 for share in shares.values())
