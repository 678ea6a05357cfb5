"""The quantiser: errors within the step, side data that covers the range, and the plan as a whole."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import random_plan

from dynamo_kvtc.codec.plan import BitPlan, PlanGroup, QuantType
from dynamo_kvtc.codec.quantiser import (
    PlanQuantiser,
    e4m3_to_float,
    float_to_e4m3,
    simulate,
)
from dynamo_kvtc.errors import EncodeRangeError

INTEGERS = [QuantType.INT2, QuantType.INT4]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("quant_type", INTEGERS)
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 300.0])
def test_integer_error_is_at_most_half_a_step(quant_type, scale):
    c = scale * normal(50, 64) + 2 * scale
    low, high = c.amin(-1, keepdim=True), c.amax(-1, keepdim=True)
    step = (high - low) / (2**quant_type.bits - 1)
    # Side data is float16: relative 2**-11 of the shift, and a subnormal's distance for tiny steps.
    slack = low.abs() * 2**-10 + step * 2**-9 + 2**quant_type.bits * 2.0**-24
    assert ((simulate(c, quant_type) - c).abs() <= step / 2 + slack).all()


def test_fp8_error_is_relative_to_each_number():
    c = normal(50, 64)
    shift = c.mean(-1, keepdim=True)
    error = (simulate(c, QuantType.FP8) - c).abs()
    assert (error <= (c - shift).abs() * 2**-4 + 2e-3).all()


def test_none_decodes_to_zero():
    assert torch.equal(simulate(normal(3, 16), QuantType.NONE), torch.zeros(3, 16))


@pytest.mark.parametrize("quant_type", [QuantType.INT2, QuantType.INT4, QuantType.FP8])
def test_groups_of_one_keep_their_shift(quant_type):
    c = 100 * normal(20, 1)
    expected = c.half().float()
    if quant_type is QuantType.FP8:
        torch.testing.assert_close(simulate(c, quant_type), c, rtol=2**-10, atol=0)
    else:
        assert torch.equal(simulate(c, quant_type), expected)


@pytest.mark.parametrize("quant_type", [QuantType.INT2, QuantType.INT4, QuantType.FP8])
def test_equal_coefficients_have_scale_zero(quant_type):
    assert torch.equal(simulate(torch.full((2, 16), 1.5), quant_type), torch.full((2, 16), 1.5))


def test_simulation_takes_many_groups_at_once():
    c = normal(7, 5, 16)
    together = simulate(c, QuantType.INT4)
    apart = torch.stack([simulate(c[:, i], QuantType.INT4) for i in range(5)], dim=1)
    assert torch.equal(together, apart)


@settings(deadline=None, max_examples=40)
@given(components=st.integers(1, 400), tokens=st.integers(0, 9), seed=st.integers(0, 1000))
def test_a_plan_quantises_as_its_groups_do(components, tokens, seed):
    plan = random_plan(components, seed)
    quantiser = PlanQuantiser(plan)
    c = normal(components, tokens, seed=seed)
    stored = c[quantiser.components]
    decoded = torch.zeros(components, tokens)
    decoded[quantiser.components] = quantiser.dequantise(quantiser.quantise(stored))
    expected = torch.zeros(components, tokens)
    for group in plan.groups:
        rows = slice(group.start, group.stop)
        expected[rows] = simulate(c[rows].t(), group.type).t()
    assert torch.equal(decoded, expected)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 1000), split=st.integers(1, 15))
def test_a_token_does_not_depend_on_its_neighbours(seed, split):
    quantiser = PlanQuantiser(random_plan(100, seed))
    c = normal(quantiser.components.numel(), 16, seed=seed)
    whole = quantiser.quantise(c)
    parts = quantiser.quantise(c[:, :split]), quantiser.quantise(c[:, split:])
    assert torch.equal(whole.side, torch.cat([part.side for part in parts], dim=1))
    for quant_type, symbols in whole.symbols.items():
        assert torch.equal(symbols, torch.cat([part.symbols[quant_type] for part in parts], dim=1))


def test_components_are_ordered_by_type_then_number():
    plan = BitPlan((PlanGroup(0, 16, QuantType.INT4), PlanGroup(16, 1, QuantType.FP8),
                    PlanGroup(20, 1, QuantType.INT2), PlanGroup(21, 16, QuantType.FP8)))  # fmt: skip
    assert PlanQuantiser(plan).components.tolist() == [16, *range(21, 37), *range(16), 20]


def test_an_empty_plan_stores_nothing():
    quantiser = PlanQuantiser(BitPlan(()))
    section = quantiser.quantise(torch.empty(0, 5))
    assert section.side.shape == (0, 5)
    assert quantiser.dequantise(section).shape == (0, 5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e6, -1e6])
@pytest.mark.parametrize("quant_type", [QuantType.INT2, QuantType.INT4, QuantType.FP8])
def test_what_side_data_cannot_carry_is_refused(bad, quant_type):
    c = normal(16, 4)
    c[3, 2] = bad
    if quant_type is QuantType.FP8 and abs(bad) == 1e6:
        c[:, 2] = bad
    with pytest.raises(EncodeRangeError, match="raw"):
        simulate(c.t(), quant_type)
    with pytest.raises(EncodeRangeError, match="raw"):
        PlanQuantiser(BitPlan((PlanGroup(0, 16, quant_type),))).quantise(c)


def test_e4m3_decoding_agrees_with_torch_for_every_pattern():
    patterns = torch.arange(256, dtype=torch.uint8)
    numbers = patterns[(patterns & 0x7F) != 0x7F]
    assert torch.equal(e4m3_to_float(numbers), numbers.view(torch.float8_e4m3fn).float())


def test_e4m3_encoding_rounds_to_the_nearest_and_saturates():
    numbers = torch.tensor([0.0, -0.0, 1.0, 1.0625, 1.1875, 448.0, 1e9, -1e9, 2.0**-9, 2.0**-11])
    expected = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.25, 448.0, 448.0, -448.0, 2.0**-9, 0.0])
    patterns = float_to_e4m3(numbers)
    assert torch.equal(e4m3_to_float(patterns), expected)
    assert patterns[1] == 0
