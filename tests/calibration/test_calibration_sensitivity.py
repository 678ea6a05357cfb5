from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_kvtc.calibration.sensitivity import (
    SHRINKAGE,
    SideSample,
    SideSensitivity,
    apply_blocks,
    fisher_blocks,
    fit_sensitivity,
    root_and_inverse,
)
from dynamo_kvtc.codec.importance import MAX_LEVEL, MIN_LEVEL
from dynamo_kvtc.errors import CalibrationError

HEADS, SIZE = 3, 8
ROW = HEADS * SIZE
DOCUMENTS = 6


def _planted(tokens: int = 6000, seed: int = 0, directions: float = 1.0):
    """Rows and gradients with a known metric and a known importance.

    A token's gradient is noise of the planted covariance times the root of its importance, whose logarithm
    is a linear function of the row, plus a level per document, plus a trend over the distance: the fit
    may use the first of the three only.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(tokens, ROW, generator=generator) * torch.linspace(2, 0.5, ROW) + 5
    weights = torch.randn(ROW, generator=generator)
    weights *= directions / (weights * torch.linspace(2, 0.5, ROW)).norm()
    documents = torch.arange(tokens) % DOCUMENTS
    distances = torch.randint(1, 1000, (tokens,), generator=generator).float()
    own = (rows - 5) @ weights
    log_importance = own + 2.0 * documents - 0.5 * distances.log2()
    factor = torch.randn(HEADS, SIZE, SIZE, generator=generator)
    fisher = factor @ factor.mT / SIZE + 0.5 * torch.eye(SIZE)
    root, _ = root_and_inverse(fisher.double(), shrinkage=0)
    noise = torch.randn(tokens, ROW, generator=generator)
    gradients = apply_blocks(noise, root) * torch.exp2(log_importance / 2)[:, None]
    return SideSample(rows, gradients, documents, distances), own, fisher


def _shape(blocks: torch.Tensor) -> torch.Tensor:
    return blocks / blocks.diagonal(dim1=1, dim2=2).sum(-1).mean()


@pytest.fixture(scope="module")
def fitted() -> tuple[SideSensitivity, SideSample, torch.Tensor, torch.Tensor]:
    sample, own, fisher = _planted()
    return fit_sensitivity(sample, SIZE), sample, own, fisher


def test_the_planted_metric_is_found_up_to_its_level(fitted):
    sensitivity, _, _, fisher = fitted
    level = fisher.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
    shrunk = (1 - SHRINKAGE) * fisher + SHRINKAGE * level * torch.eye(SIZE)
    found = sensitivity.metric @ sensitivity.metric
    difference = _shape(found) - _shape(shrunk)
    # Six thousand gradients, of which few decide: documents and distances change their sizes by far.
    assert float(difference.norm()) < 0.15 * float(_shape(shrunk).norm())


def test_the_planted_importance_is_found_whatever_documents_and_distances_do(fitted):
    sensitivity, sample, own, _ = fitted
    predicted = (sample.rows - sensitivity.mean) @ sensitivity.weights + sensitivity.bias
    correlation = torch.corrcoef(torch.stack([predicted, own]))[0, 1]
    assert float(correlation) > 0.97
    # The ridge makes predictions smaller than the truth, never larger.
    assert 0.6 < float(predicted.std() / own.std()) < 1.05
    # The logarithm of a chi-squared size scatters, too: no fit explains everything.
    assert 0.3 < sensitivity.explained < 1


def test_importance_is_around_one_and_scales_are_its_levels(fitted):
    sensitivity, sample, _, _ = fitted
    predicted = (sample.rows - sensitivity.mean) @ sensitivity.weights + sensitivity.bias
    assert abs(float(predicted.mean())) < 1e-3
    levels = predicted.round().clamp(MIN_LEVEL, MAX_LEVEL)
    torch.testing.assert_close(sensitivity.scales(sample.rows), torch.exp2(levels / 2))


def test_rows_that_say_nothing_get_hardly_any_importance():
    sample, _, _ = _planted(directions=0.0)
    sensitivity = fit_sensitivity(sample, SIZE)
    assert sensitivity.explained < 0.02
    assert float(sensitivity.scales(sample.rows).log2().abs().mean()) < 0.05


def test_the_level_of_gradients_changes_the_metric_alone():
    sample, _, _ = _planted(tokens=500)
    larger = SideSample(sample.rows, sample.gradients * 64, sample.documents, sample.distances)
    one, other = fit_sensitivity(sample, SIZE), fit_sensitivity(larger, SIZE)
    torch.testing.assert_close(other.metric, one.metric * 64, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(other.weights, one.weights, rtol=1e-3, atol=1e-4)


def test_the_fit_repeats_bit_for_bit():
    sample, _, _ = _planted(tokens=700)
    one = fit_sensitivity(sample, SIZE)
    for _ in range(3):
        other = fit_sensitivity(sample, SIZE)
        for name in ("metric", "inverse", "mean", "weights"):
            assert torch.equal(getattr(one, name), getattr(other, name))
        assert (one.bias, one.explained) == (other.bias, other.explained)


@pytest.mark.parametrize("tokens", [12, 40])
def test_few_rows_and_constant_channels_give_finite_parameters(tokens):
    sample, _, _ = _planted(tokens=tokens)
    rows = sample.rows.clone()
    rows[:, 3] = 1.0
    rows[:, 9] = rows[:, 10]
    sensitivity = fit_sensitivity(
        SideSample(rows, sample.gradients, sample.documents, sample.distances), SIZE
    )
    for tensor in (sensitivity.metric, sensitivity.inverse, sensitivity.weights, sensitivity.scales(rows)):
        assert tensor.isfinite().all()


def test_gradients_in_half_precision_are_taken_in_float32():
    sample, _, _ = _planted(tokens=500)
    halved = SideSample(sample.rows, sample.gradients.bfloat16(), sample.documents, sample.distances)
    full, half = fit_sensitivity(sample, SIZE), fit_sensitivity(halved, SIZE)
    assert half.metric.dtype is torch.float32
    torch.testing.assert_close(
        half.metric, full.metric, rtol=0.02, atol=0.02 * float(full.metric.abs().max())
    )


@pytest.mark.parametrize("bad", [0.0, torch.nan, torch.inf])
def test_gradients_that_are_zero_or_not_finite_are_refused(bad):
    sample, _, _ = _planted(tokens=200)
    gradients = sample.gradients.clone()
    gradients[:, SIZE : 2 * SIZE] = bad
    with pytest.raises(CalibrationError, match="longer documents"):
        fit_sensitivity(SideSample(sample.rows, gradients, sample.documents, sample.distances), SIZE)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1 << 16),
    heads=st.integers(1, 4),
    size=st.integers(1, 6),
    rank=st.integers(1, 6),
    level=st.sampled_from([1e-6, 1.0, 1e6]),
)
def test_roots_are_symmetric_inverse_and_square_to_the_shrunk_block(seed, heads, size, rank, level):
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(heads, size, rank, generator=generator, dtype=torch.float64)
    blocks = level * factor @ factor.mT
    root, inverse = root_and_inverse(blocks)
    for head in range(heads):
        mean = blocks[head].trace() / size
        shrunk = (1 - SHRINKAGE) * blocks[head] + SHRINKAGE * mean * torch.eye(size, dtype=torch.float64)
        scale = float(shrunk.norm())
        own, its_inverse = root[head].double(), inverse[head].double()
        torch.testing.assert_close(own @ own, shrunk, rtol=0, atol=1e-5 * scale)
        torch.testing.assert_close(own, own.T, rtol=0, atol=1e-6 * scale**0.5)
        identity = torch.eye(size, dtype=torch.float64)
        torch.testing.assert_close(own @ its_inverse, identity, rtol=0, atol=1e-4)


@pytest.mark.parametrize("bad", [0.0, torch.nan, torch.inf])
def test_blocks_without_a_root_are_refused(bad):
    blocks = torch.eye(4, dtype=torch.float64).repeat(3, 1, 1)
    blocks[1] *= bad
    with pytest.raises(CalibrationError, match="does not depend"):
        root_and_inverse(blocks)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1 << 16), tokens=st.integers(0, 5), heads=st.integers(1, 4), size=st.integers(1, 6)
)
def test_blocks_are_applied_head_by_head(seed, tokens, heads, size):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(tokens, heads * size, generator=generator)
    factor = torch.randn(heads, size, size, generator=generator)
    blocks = factor + factor.mT
    applied = apply_blocks(rows, blocks)
    assert applied.shape == rows.shape and applied.dtype is torch.float32
    expected = torch.empty(tokens, heads * size, dtype=torch.float64)
    for token in range(tokens):
        for head in range(heads):
            part = slice(head * size, (head + 1) * size)
            expected[token, part] = blocks[head].double() @ rows[token, part].double()
    torch.testing.assert_close(applied.double(), expected, rtol=1e-5, atol=1e-4)


def test_fisher_blocks_are_mean_outer_products():
    generator = torch.Generator().manual_seed(5)
    gradients = torch.randn(40, 12, generator=generator)
    blocks = fisher_blocks(gradients, 4)
    for head in range(3):
        part = gradients[:, 4 * head : 4 * head + 4].double()
        expected = sum(torch.outer(row, row) for row in part) / 40
        torch.testing.assert_close(blocks[head], expected, rtol=1e-5, atol=1e-6)
