"""Rate control over synthetic coefficients.

Real streams and a real model take seconds a step; here formulas stand in for them: bytes are the entropy
of the plans' symbols with a percentage and a constant on top, divergence is proportional to a power of the
squared error. `test_calibration_rd_run.py` has the real ones.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_kvtc.calibration.artifact_writer import MeasuredPlan
from dynamo_kvtc.calibration.rd_plans import FittedPlan
from dynamo_kvtc.calibration.rd_search import PlanSearch, Rung
from dynamo_kvtc.errors import CalibrationError, EncodeRangeError

COMPONENTS = 48
ROW_BITS = 2 * 16 * COMPONENTS


@dataclasses.dataclass
class _Streams:
    """Stands in for streams and model, and counts how often it is asked."""

    coefficients: Sequence[torch.Tensor]
    overhead: float = 1.2
    constant: float = 2.0
    exponent: float = 1.0
    kl_floor: float = 0.0
    calls: int = 0

    def ratio(self, plans: Sequence[FittedPlan]) -> float:
        self.calls += 1
        return ROW_BITS / (self.overhead * sum(fit.bits for fit in plans) + self.constant)

    def measure(self, plans: Sequence[FittedPlan]) -> MeasuredPlan:
        error = sum(
            float(c.square().sum() - c[:, fit.plan.components].square().sum())
            + float((c[:, fit.plan.components] - fit.decoded).square().sum())
            for c, fit in zip(self.coefficients, plans, strict=True)
        )
        whole = sum(float(c.square().sum()) for c in self.coefficients)
        kl = self.kl_floor + (error / whole) ** self.exponent
        return MeasuredPlan(self.ratio(plans), kl=kl, top1=math.exp(-kl), tokens=100)

    def search(self) -> PlanSearch:
        return PlanSearch(self.coefficients, ROW_BITS, self.ratio, self.measure)


@pytest.fixture(scope="module")
def coefficients() -> list[torch.Tensor]:
    """Keys and values whose components' deviations fall as real ones do."""
    generator = torch.Generator().manual_seed(0)
    deviations = 8.0 / torch.arange(1, COMPONENTS + 1) ** 0.7
    return [torch.randn(250, COMPONENTS, generator=generator) * deviations * level for level in (1.0, 0.6)]


@pytest.fixture(scope="module")
def ladder(coefficients) -> list[Rung]:
    search = _Streams(coefficients).search()
    return [search.for_ratio(ratio) for ratio in (8.0, 32.0)]


@settings(max_examples=8, deadline=None)
@given(
    ratio=st.floats(5, 40),
    overhead=st.floats(1.0, 1.5),
    constant=st.floats(0, 8),
)
def test_ratios_are_met_whatever_streams_take_on_top(coefficients, ratio, overhead, constant):
    streams = _Streams(coefficients, overhead, constant)
    rung = streams.search().for_ratio(ratio)
    # With so few components a ratio moves by per cents when one more is stored.
    assert rung.measured.ratio == pytest.approx(ratio, rel=0.06)
    assert streams.calls <= 6
    assert len(rung.plans) == 2
    assert {fit.plan.step for fit in rung.plans} == {rung.step}


def test_higher_ratios_take_larger_steps_and_lose_more(ladder):
    fine, coarse = ladder
    assert fine.step < coarse.step
    assert fine.measured.kl < coarse.measured.kl
    assert fine.measured.ratio == pytest.approx(8, rel=0.01)
    assert coarse.measured.ratio == pytest.approx(32, rel=0.01)


def test_the_search_repeats_exactly(coefficients, ladder):
    again = _Streams(coefficients).search().for_ratio(8.0)
    assert again.step == ladder[0].step
    assert again.measured == ladder[0].measured


@pytest.mark.parametrize("ratio", [0.5, 1e5])
def test_ratios_that_no_step_reaches_are_refused(coefficients, ratio):
    with pytest.raises(CalibrationError, match=f"no step reaches a ratio of {ratio:g}"):
        _Streams(coefficients).search().for_ratio(ratio)


def test_ratios_beyond_what_streams_take_without_any_symbol_are_refused(coefficients):
    streams = _Streams(coefficients, constant=ROW_BITS / 20)  # so that empty plans have a ratio of 20
    with pytest.raises(CalibrationError, match="no step reaches a ratio of 40"):
        streams.search().for_ratio(40.0)
    assert streams.calls <= 5


def test_steps_that_symbols_cannot_hold_are_refused(coefficients):
    def refuse(plans: Sequence[FittedPlan]) -> float:
        raise EncodeRangeError("beyond all symbols")

    streams = _Streams(coefficients)
    with pytest.raises(CalibrationError, match="ask for a higher ratio"):
        PlanSearch(coefficients, ROW_BITS, refuse, streams.measure).for_ratio(8.0)


@pytest.mark.parametrize("exponent", [0.8, 1.0, 1.6])
@pytest.mark.parametrize("where", [-0.5, 0.3, 0.5, 0.9, 1.3])
def test_a_divergence_is_used_up_but_not_exceeded(coefficients, exponent, where):
    streams = _Streams(coefficients, exponent=exponent)
    search = streams.search()
    known = [search.for_ratio(ratio) for ratio in (8.0, 32.0)]
    low, high = (rung.measured.kl for rung in known)
    max_kl = low * (high / low) ** where  # between the known rungs, and beyond them
    calls = streams.calls
    rung = search.for_divergence(max_kl, known)
    assert streams.calls - calls <= 3
    assert rung.measured.kl <= max_kl
    assert rung.measured.kl >= 0.8 * max_kl
    assert all(rung.measured.ratio >= other.measured.ratio for other in known if other.measured.kl <= max_kl)


def test_a_limit_that_nothing_exceeds_stores_nothing(coefficients, ladder):
    rung = _Streams(coefficients).search().for_divergence(50.0, ladder)
    assert [fit.plan.rank for fit in rung.plans] == [0, 0]
    assert rung.measured.kl == 1.0


def test_one_known_rung_is_enough(coefficients, ladder):
    max_kl = 0.5 * ladder[1].measured.kl
    rung = _Streams(coefficients).search().for_divergence(max_kl, ladder[1:])
    assert 0.8 * max_kl <= rung.measured.kl <= max_kl


def test_a_known_rung_is_returned_where_nothing_better_is_found(coefficients, ladder):
    streams = _Streams(coefficients)

    def bad(plans: Sequence[FittedPlan]) -> MeasuredPlan:
        return dataclasses.replace(streams.measure(plans), kl=1.0)

    search = PlanSearch(coefficients, ROW_BITS, streams.ratio, bad)
    max_kl = 1.5 * ladder[0].measured.kl
    assert search.for_divergence(max_kl, ladder) is ladder[0]


def test_a_divergence_below_the_noise_floor_is_refused_with_the_best_that_was_seen(coefficients):
    streams = _Streams(coefficients, kl_floor=0.002)
    search = streams.search()
    known = [search.for_ratio(8.0)]
    calls = streams.calls
    with pytest.raises(CalibrationError, match=r"KL of 0\.001 .* noise floor"):
        search.for_divergence(0.001, known)
    assert streams.calls - calls <= 3


def test_a_divergence_whose_steps_symbols_cannot_hold_is_refused(coefficients, ladder):
    def refuse(plans: Sequence[FittedPlan]) -> MeasuredPlan:
        raise EncodeRangeError("beyond all symbols")

    search = PlanSearch(coefficients, ROW_BITS, _Streams(coefficients).ratio, refuse)
    with pytest.raises(CalibrationError, match="no step reached a KL"):
        search.for_divergence(1e-9, ladder)


def test_a_divergence_of_exactly_zero_is_met_by_any_limit(coefficients):
    lossless = MeasuredPlan(10.0, kl=0.0, top1=1.0)
    search = PlanSearch(coefficients, ROW_BITS, lambda plans: 10.0, lambda plans: lossless)
    rung = search.for_divergence(0.01, [search.for_ratio(10.0)])
    assert rung.measured == lossless
    assert math.isfinite(rung.step)
