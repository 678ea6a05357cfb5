from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_kvtc.calibration.rd_plans import (
    ESCAPE_BITS,
    LAGRANGIAN,
    MINIMUM_RATE,
    ROUNDINGS,
    estimate_rate,
    fit_plan,
)
from dynamo_kvtc.codec.rd_plan import RdPlan, SymbolClass
from dynamo_kvtc.codec.rd_quantiser import RdQuantiser, dequantise, quantise

COUNTED = 40
SYMBOLS_PER_BYTE = {SymbolClass.BYTE: 1, SymbolClass.NIBBLE: 2, SymbolClass.TRIT: 5}
SECOND_BYTE = 0.2


def _laplacian(tokens: int, deviations: list[float], seed: int = 0) -> torch.Tensor:
    """Coefficients with the given deviations: peaked and heavy-tailed, as real ones are."""
    noise = np.random.default_rng(seed).laplace(size=(tokens, len(deviations))) / math.sqrt(2)
    return torch.from_numpy(noise).float() * torch.tensor(deviations)


@dataclass
class _Choice:
    """What the slow reference says of one component."""

    rounding: float
    cost: float
    rate: float
    offsets: tuple[float, float]
    symbol_class: SymbolClass
    symbols: list[int]


def _best(column: list[float], step: float) -> _Choice:
    """Try every rounding on one component, symbol by symbol, in float64."""
    tried = [_try(column, step, rounding) for rounding in ROUNDINGS]
    return min(tried, key=lambda choice: choice.cost)


def _try(column: list[float], step: float, rounding: float) -> _Choice:
    symbols, excess = [], {1: [], 2: []}
    for value in column:
        magnitude = abs(value) / step
        q = math.floor(magnitude + rounding)
        symbols.append(int(math.copysign(q, value)))
        if q:
            excess[min(q, 2)].append(magnitude - q)
    offsets = tuple(sum(part) / len(part) if part else 0.0 for part in (excess[1], excess[2]))
    distortion = 0.0
    for value, symbol in zip(column, symbols, strict=True):
        decoded = 0.0 if symbol == 0 else abs(symbol) + offsets[min(abs(symbol), 2) - 1]
        distortion += (abs(value) / step - decoded) ** 2 / len(column)
    # Magnitudes beyond those counted apart fall together, and cost what tells them apart.
    counted = Counter(max(-COUNTED, min(symbol, COUNTED)) for symbol in symbols)
    shares = [count / len(column) for count in counted.values()]
    rate = -sum(share * math.log2(share) for share in shares)
    rate += sum(2 * math.log2(max(1, abs(symbol) - COUNTED + 1)) for symbol in symbols) / len(symbols)
    costs = {SymbolClass.WIDE: rate + SECOND_BYTE}
    for symbol_class, per_byte in SYMBOLS_PER_BYTE.items():
        escapes = sum(abs(symbol) > symbol_class.limit for symbol in symbols) / len(column)
        deflated = (1 + (per_byte * rate) ** 3) ** (1 / 3) / per_byte
        costs[symbol_class] = deflated + ESCAPE_BITS * escapes
    return _Choice(
        rounding,
        distortion + LAGRANGIAN * rate,
        rate,
        offsets,
        min(SymbolClass, key=lambda symbol_class: costs[symbol_class]),
        symbols,
    )


def _energy(column: list[float], step: float) -> float:
    return sum((value / step) ** 2 for value in column) / len(column)


@pytest.mark.parametrize("step", [0.3, 1.0, 2.5])
def test_plans_are_those_of_an_exhaustive_search(step):
    coefficients = _laplacian(300, [9.0, 0.02, 4.0, 1.5, 0.6, 12.0, 0.9, 0.05, 2.2])
    fitted = fit_plan(coefficients, step)
    columns = coefficients.double().T.tolist()
    best = {component: _best(column, step) for component, column in enumerate(columns)}
    kept = {
        component
        for component, choice in best.items()
        if choice.cost < _energy(columns[component], step) and choice.rate > MINIMUM_RATE
    }
    plan = fitted.plan
    assert set(plan.components.tolist()) == kept
    assert fitted.bits == pytest.approx(sum(best[component].rate for component in kept), rel=1e-5)
    first = 0
    for symbol_class, count in zip(SymbolClass, plan.counts, strict=True):
        rates = []
        for row in range(first, first + count):
            choice = best[int(plan.components[row])]
            assert choice.symbol_class is symbol_class
            assert float(plan.rounding[row]) == pytest.approx(choice.rounding)
            assert plan.offsets[:, row].tolist() == pytest.approx(choice.offsets, abs=1e-5)
            rates.append(choice.rate)
        assert rates == sorted(rates, reverse=True)
        first += count


def test_every_class_is_used_where_it_is_the_cheapest():
    # At a bit or more a symbol, BYTE needs no escapes and costs no more than NIBBLE.
    deviations = {
        SymbolClass.WIDE: 2000.0,
        SymbolClass.BYTE: 15.0,
        SymbolClass.NIBBLE: 0.5,
        SymbolClass.TRIT: 0.4,
    }
    counts = fit_plan(_laplacian(2000, list(deviations.values())), 1.0).plan.counts
    assert counts == (1, 1, 1, 1)


def test_offsets_are_the_centroids_of_their_intervals():
    coefficients = _laplacian(4000, [3.0, 0.9])
    plan = fit_plan(coefficients, 1.0).plan
    for row, component in enumerate(plan.components.tolist()):
        magnitudes = coefficients[:, component].abs()
        q = (magnitudes + plan.rounding[row]).floor()
        for which, chosen in enumerate((q == 1, q >= 2)):
            # No other offset would have a smaller squared error.
            left = (magnitudes - q - plan.offsets[which, row])[chosen]
            assert abs(float(left.mean())) < 1e-5


def test_decoded_coefficients_are_what_the_codec_decodes():
    coefficients = _laplacian(200, [6.0, 1.0, 0.4, 300.0, 2.0])
    fitted = fit_plan(coefficients, 0.7)
    plan = fitted.plan
    u = coefficients[:, plan.components] / plan.step
    direct = dequantise(quantise(u, plan.rounding), plan.offsets[:, None]) * plan.step
    torch.testing.assert_close(fitted.decoded, direct)
    codec, ones = RdQuantiser(plan), torch.ones(200)
    symbols = codec.quantise(coefficients[:, plan.components].T, ones)
    # The codec multiplies by 1 / step where the fit divides: values on a border may differ by a symbol.
    apart = (codec.dequantise(symbols, ones).T - fitted.decoded).abs() > 1e-4
    assert float(apart.float().mean()) < 1e-3


def test_nothing_worth_a_bit_gives_an_empty_plan():
    for coefficients in (torch.zeros(50, 4), _laplacian(50, [0.01, 0.02]), torch.empty(50, 0)):
        fitted = fit_plan(coefficients, 1.0)
        assert (fitted.plan.rank, fitted.plan.counts, fitted.bits) == (0, (0, 0, 0, 0), 0.0)
        assert fitted.decoded.shape == (50, 0)
        assert estimate_rate(coefficients, 1.0) == 0.0


def test_zero_components_among_others_are_left_out():
    coefficients = _laplacian(300, [3.0, 0.0, 2.0, 0.0])
    assert sorted(fit_plan(coefficients, 1.0).plan.components.tolist()) == [0, 2]


def test_a_constant_component_is_not_worth_storing():
    # Its symbols have no entropy; means are subtracted beforehand, so there is none in practice.
    assert fit_plan(torch.full((300, 1), 5.0), 1.0).plan.rank == 0


def test_the_estimate_is_close_to_the_plan():
    coefficients = _laplacian(384, [8.0 / (1 + i) for i in range(40)])
    for step in (0.2, 0.5, 1.0, 2.0):
        assert estimate_rate(coefficients, step) == pytest.approx(fit_plan(coefficients, step).bits, rel=0.1)


def test_magnitudes_beyond_those_counted_apart_cost_more_bits_the_larger_they_are():
    rates = [estimate_rate(_laplacian(384, [1000.0]), step) for step in (10.0, 1.0, 0.1)]
    assert rates[0] < rates[1] < rates[2]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1 << 16),
    tokens=st.integers(100, 300),
    deviations=st.lists(st.floats(0, 20), min_size=1, max_size=12),
    step=st.floats(0.05, 5.0),
)
def test_every_plan_is_valid_and_its_error_is_bounded(seed, tokens, deviations, step):
    coefficients = _laplacian(tokens, deviations, seed)
    fitted = fit_plan(coefficients, step)
    plan = fitted.plan
    assert isinstance(plan, RdPlan)  # whose constructor checks components, roundings and offsets
    assert plan.step == step and sum(plan.counts) == plan.components.numel()
    stored = coefficients[:, plan.components]
    # At worst 0.81 of a step is rounded away, and reconstruction points lie in their intervals.
    assert bool(((stored - fitted.decoded).abs() <= step * 1.0001).all())
    # Whatever is stored, its squared error is smaller than if it were not.
    errors = (stored - fitted.decoded).square().sum(0)
    assert bool((errors < stored.square().sum(0)).all())
    assert fitted.bits >= 0


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 1 << 16),
    deviations=st.lists(st.floats(0.1, 20), min_size=4, max_size=12),
    step=st.floats(0.1, 3.0),
)
def test_a_smaller_step_stores_more_and_loses_less(seed, deviations, step):
    coefficients = _laplacian(300, deviations, seed)

    def bits_and_error(width: float) -> tuple[float, float]:
        fitted = fit_plan(coefficients, width)
        decoded = torch.zeros_like(coefficients)
        decoded[:, fitted.plan.components] = fitted.decoded
        return fitted.bits, float((coefficients - decoded).square().sum())

    (coarse_bits, coarse_error), (fine_bits, fine_error) = bits_and_error(step), bits_and_error(step / 2)
    assert fine_bits >= coarse_bits
    assert fine_error <= coarse_error * 1.0001
