from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_kvtc.calibration import allocate
from dynamo_kvtc.calibration.allocate import (
    STORED_TYPES,
    ErrorTable,
    budget_bits,
    measure_errors,
    plan_bits,
    start_step,
)
from dynamo_kvtc.codec.plan import GROUP_SIZES, BitPlan, PlanGroup
from dynamo_kvtc.codec.quantiser import simulate
from dynamo_kvtc.errors import CalibrationError, EncodeRangeError


def plan_error(table: ErrorTable, plan: BitPlan) -> float:
    covered = {i for group in plan.groups for i in range(group.start, group.stop)}
    error = sum(energy for i, energy in enumerate(table.energy) if i not in covered)
    for group in plan.groups:
        index = group.start // start_step(group.size)
        error += table.windows[group.size][STORED_TYPES.index(group.type), index]
    return float(error)


def all_plans(components: int) -> list[BitPlan]:
    """Every plan there is: at each component leave it out, or start any group that fits."""

    def extend(start: int):
        if start == components:
            yield ()
            return
        yield from extend(start + 1)
        for size, type_ in itertools.product(GROUP_SIZES, STORED_TYPES):
            if start + size <= components and start % start_step(size) == 0:
                for rest in extend(start + size):
                    yield (PlanGroup(start, size, type_), *rest)

    return [BitPlan(groups) for groups in extend(0)]


SMALL_PLANS = {components: all_plans(components) for components in (1, 3, 5)}
LARGER_PLANS = [
    BitPlan(tuple(group for group in groups if group is not None))
    for groups in itertools.product(
        [None, *(PlanGroup(start, 16, type_) for start in (0, 1, 2) for type_ in STORED_TYPES)],
        [None, *(PlanGroup(18, 1, type_) for type_ in STORED_TYPES)],
    )
]


def random_table(components: int, seed: int) -> ErrorTable:
    generator = np.random.default_rng(seed)
    return ErrorTable(
        generator.exponential(size=components),
        {
            size: generator.exponential(size=(3, (components - size) // start_step(size) + 1))
            for size in GROUP_SIZES
            if size <= components
        },
    )


@settings(max_examples=60, deadline=None)
@given(
    components=st.sampled_from(sorted(SMALL_PLANS)),
    seed=st.integers(0, 10_000),
    budgets=st.lists(st.integers(0, 230), min_size=1, max_size=4),
)
def test_plans_equal_brute_force(components, seed, budgets):
    table = random_table(components, seed)
    for budget, plan in zip(budgets, plan_bits(table, budgets), strict=True):
        least = min(
            plan_error(table, other) for other in SMALL_PLANS[components] if other.bits_per_token <= budget
        )
        assert plan.bits_per_token <= budget
        assert plan_error(table, plan) == pytest.approx(least, rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), budget=st.integers(60, 240))
def test_plans_are_no_worse_than_any_plan_with_a_large_group(seed, budget):
    table = random_table(19, seed)
    [plan] = plan_bits(table, [budget])
    for other in LARGER_PLANS:
        if other.bits_per_token <= budget:
            assert plan_error(table, plan) <= plan_error(table, other) + 1e-12


@settings(max_examples=15, deadline=None)
@given(components=st.integers(1, 150), seed=st.integers(0, 10_000))
def test_error_falls_with_the_budget_which_is_never_exceeded(components, seed):
    table = random_table(components, seed)
    budgets = [0, 33, 34, 100, 400, 1000, 3000]
    plans = plan_bits(table, budgets)
    errors = [plan_error(table, plan) for plan in plans]
    assert all(plan.bits_per_token <= budget for plan, budget in zip(plans, budgets, strict=True))
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(errors))
    assert plans[0].groups == () and plans[1].groups == ()


def test_coarse_units_keep_the_budget(monkeypatch):
    table = random_table(80, 3)
    [exact] = plan_bits(table, [700])
    monkeypatch.setattr(allocate, "_CHOICE_CELLS", 81 * 60)
    [coarse] = plan_bits(table, [700])
    assert coarse.bits_per_token <= 700
    assert plan_error(table, coarse) >= plan_error(table, exact) - 1e-9


def test_measured_errors_are_those_of_simulated_quantisation():
    generator = torch.Generator().manual_seed(2)
    coefficients = torch.randn(70, 9, generator=generator) * torch.linspace(5, 0.1, 70)[:, None]
    table = measure_errors(coefficients)
    np.testing.assert_allclose(table.energy, coefficients.double().square().mean(1).numpy())
    assert sorted(table.windows) == [1, 16, 64]
    for size, type_ in itertools.product((1, 16, 64), STORED_TYPES):
        errors = table.windows[size][STORED_TYPES.index(type_)]
        assert len(errors) == (70 - size) // start_step(size) + 1
        for index in (0, len(errors) - 1):
            start = index * start_step(size)
            group = coefficients[start : start + size].T
            expected = float((simulate(group, type_) - group).square().sum() / 9)
            assert errors[index] == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_measuring_leaves_the_number_of_threads_alone():
    before = torch.get_num_threads()
    measure_errors(torch.randn(20, 5))
    assert torch.get_num_threads() == before


def test_coefficients_beyond_the_side_data_are_refused():
    with pytest.raises(EncodeRangeError):
        measure_errors(torch.full((16, 4), 1e6))


@pytest.mark.parametrize(("row", "ratio", "bits"), [(5760, 16, 5760), (1920, 8, 3840), (100, 3, 533)])
def test_budget_is_sixteen_bits_an_element_over_the_ratio(row, ratio, bits):
    assert budget_bits(row, ratio) == bits


@pytest.mark.parametrize("ratio", [1.0, 0.0, -3.0, float("nan")])
def test_ratios_that_save_nothing_are_refused(ratio):
    with pytest.raises(CalibrationError):
        budget_bits(100, ratio)
