from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamo_kvtc.calibration.fit import FitMethod
from dynamo_kvtc.calibration.rd_basis import RdBasis, fit_rd_basis, load_rd_basis, save_rd_basis
from dynamo_kvtc.calibration.rd_plans import fit_plan
from dynamo_kvtc.calibration.sensitivity import SideSensitivity, apply_blocks, root_and_inverse
from dynamo_kvtc.calibration.statistics import Moments
from dynamo_kvtc.codec.parameters import RdSideParameters
from dynamo_kvtc.codec.rd_side import RdSideCodec
from dynamo_kvtc.errors import CalibrationError

LAYERS, HEADS, SIZE = 2, 2, 6
LAYER_SIZE = HEADS * SIZE
ROW = LAYERS * LAYER_SIZE


def _sensitivity(seed: int = 0) -> SideSensitivity:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(LAYERS * HEADS, SIZE, SIZE, generator=generator, dtype=torch.float64)
    metric, inverse = root_and_inverse(factor @ factor.mT + torch.eye(SIZE))
    return SideSensitivity(
        metric,
        inverse,
        mean=torch.full((ROW,), 3.0),
        weights=torch.randn(ROW, generator=generator) / ROW**0.5,
        bias=0.3,
        explained=0.5,
    )


def _rows(tokens: int = 900, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, ROW, generator=generator) * torch.linspace(3, 0.1, ROW)
    return mixed @ torch.linalg.qr(torch.randn(ROW, ROW, generator=generator)).Q + 3.0


def _moments(rows: torch.Tensor, sensitivity: SideSensitivity) -> Moments:
    """Statistics as the calibration takes them."""
    moments = Moments(ROW)
    for batch in rows.split(250):
        weights = sensitivity.scales(batch).square()
        moments.update(apply_blocks(batch - sensitivity.mean, sensitivity.metric), weights)
    return moments


@pytest.fixture(scope="module")
def basis() -> RdBasis:
    sensitivity = _sensitivity()
    return fit_rd_basis(
        _moments(_rows(), sensitivity),
        sensitivity,
        method=FitMethod.EIGH,
        seed=0,
        basis_dtype=torch.float32,
    )


def test_coefficients_and_reconstruction_are_inverse_for_a_full_basis(basis):
    rows = _rows(seed=2)
    unscaled = basis.coefficients(rows) / basis.scales(rows)[:, None]
    restored = basis.reconstruct(unscaled, torch.arange(ROW)) + basis.mean
    torch.testing.assert_close(restored, rows, rtol=1e-4, atol=1e-4)


def test_components_left_out_cost_what_they_hold_in_the_metric(basis):
    rows = _rows(seed=2)
    unscaled = basis.coefficients(rows) / basis.scales(rows)[:, None]
    kept = torch.tensor([5, 0, 9])
    left = rows - basis.mean - basis.reconstruct(unscaled[:, kept], kept)
    error = apply_blocks(left, basis.metric).square().sum(1)
    others = [component for component in range(ROW) if component not in kept.tolist()]
    torch.testing.assert_close(error, unscaled[:, others].square().sum(1), rtol=1e-3, atol=1e-3)


def test_variances_are_those_of_scaled_coefficients_and_fall(basis):
    coefficients = basis.coefficients(_rows())
    torch.testing.assert_close(basis.variances, coefficients.square().mean(0), rtol=1e-3, atol=1e-4)
    assert basis.variances.tolist() == sorted(basis.variances.tolist(), reverse=True)
    assert basis.total_variance == pytest.approx(float(basis.variances.sum()), rel=1e-5)
    # Principal components are uncorrelated.
    covariance = coefficients.T @ coefficients / coefficients.shape[0]
    off_diagonal = covariance - covariance.diagonal().diag()
    assert float(off_diagonal.abs().max()) < 1e-3 * float(basis.variances[0])


def test_the_mean_is_the_weighted_one(basis):
    rows, sensitivity = _rows(), _sensitivity()
    weights = sensitivity.scales(rows).double().square()
    expected = (weights[:, None] * rows.double()).sum(0) / weights.sum()
    torch.testing.assert_close(basis.mean.double(), expected, rtol=1e-5, atol=1e-4)
    assert float((basis.mean - rows.mean(0)).abs().max()) > 0.05  # and importance moved it


def test_moving_the_mean_does_not_change_what_importance_is_predicted(basis):
    sensitivity, rows = _sensitivity(), _rows(tokens=5000, seed=3)
    predicted = (rows - basis.mean) @ basis.importance + basis.importance_bias
    before = (rows - sensitivity.mean) @ sensitivity.weights + sensitivity.bias
    torch.testing.assert_close(predicted, before, rtol=1e-5, atol=1e-4)
    # Rounding to levels may differ for a row that lies on a border, in the last bit.
    same = basis.scales(rows) == sensitivity.scales(rows)
    assert float(same.float().mean()) > 0.999
    assert basis.scales(rows).unique().numel() > 3


@pytest.mark.parametrize("basis_dtype", [torch.float32, torch.float16])
def test_the_codec_computes_what_calibration_does(basis_dtype):
    sensitivity, rows = _sensitivity(), _rows(tokens=300, seed=4)
    basis = fit_rd_basis(
        _moments(_rows(), sensitivity), sensitivity, method=FitMethod.EIGH, seed=0, basis_dtype=basis_dtype
    )
    assert basis.basis.dtype is basis_dtype
    coefficients = basis.coefficients(rows)
    fitted = fit_plan(coefficients, 0.8)
    assert fitted.plan.rank > 4
    codec = RdSideCodec(
        RdSideParameters(
            mean=basis.mean,
            basis=basis.basis.float(),
            metric=basis.metric,
            importance=basis.importance,
            importance_bias=basis.importance_bias,
            plans={0: fitted.plan},
        ),
        0,
        LAYER_SIZE,
        torch.float32,
    )
    payload, _ = codec.encode(rows)
    decoded = codec.decode(payload, rows.shape[0])
    expected = fitted.decoded / basis.scales(rows)[:, None]
    # Both multiply in another order, so a coefficient on a border may get the neighbouring symbol.
    apart = (decoded - expected).abs() > 1e-4 * expected.abs() + 1e-5
    assert float(apart.float().mean()) < 1e-3
    whole = basis.reconstruct(decoded, fitted.plan.components) + basis.mean
    for layer in range(LAYERS):
        columns = slice(layer * LAYER_SIZE, (layer + 1) * LAYER_SIZE)
        torch.testing.assert_close(codec.reconstruct(decoded, layer), whole[:, columns], rtol=1e-4, atol=1e-4)


def test_a_saved_basis_comes_back_bit_for_bit(basis, tmp_path):
    path = tmp_path / "basis.safetensors"
    save_rd_basis(path, basis)
    again = load_rd_basis(path)
    for name in ("mean", "importance", "metric", "inverse", "basis", "variances"):
        assert torch.equal(getattr(again, name), getattr(basis, name))
    assert (again.importance_bias, again.total_variance) == (basis.importance_bias, basis.total_variance)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("damage", [lambda data: data[:100], lambda data: b"", lambda data: b"\x00" * 64])
def test_a_damaged_basis_is_refused(basis, tmp_path, damage):
    path = tmp_path / "basis.safetensors"
    save_rd_basis(path, basis)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CalibrationError, match="remove it and calibrate again"):
        load_rd_basis(path)


def test_rows_that_do_not_vary_are_refused():
    sensitivity, moments = _sensitivity(), Moments(ROW)
    moments.update(torch.ones(20, ROW), torch.ones(20))
    with pytest.raises(CalibrationError, match="do not vary"):
        fit_rd_basis(moments, sensitivity, method=FitMethod.EIGH, seed=0, basis_dtype=torch.float16)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    offset=st.sampled_from([0.0, 10.0, 500.0]),
    spread=st.integers(0, 8),
)
def test_weighted_moments_are_those_of_all_rows_together(sizes, offset, spread):
    generator = torch.Generator().manual_seed(sum(sizes))
    batches = [torch.randn(size, 6, generator=generator) + offset for size in sizes]
    weights = [2.0 ** torch.randint(-spread, spread + 1, (size,), generator=generator) for size in sizes]
    moments = Moments(6)
    for batch, factors in zip(batches, weights, strict=True):
        moments.update(batch, factors)
    rows, factors = torch.cat(batches).double().numpy(), torch.cat(weights).double().numpy()
    assert moments.count == len(rows)
    assert moments.weight == pytest.approx(factors.sum())
    if len(rows):
        mean = (factors[:, None] * rows).sum(0) / factors.sum()
        scatter = (factors[:, None] * (rows - mean)).T @ (rows - mean)
        np.testing.assert_allclose(moments.mean.numpy(), mean, rtol=1e-5, atol=1e-5)
        scale = np.abs(scatter).max() + factors.sum() * 1e-3
        np.testing.assert_allclose(moments.scatter.numpy(), scatter, rtol=1e-4, atol=1e-4 * scale)
        np.testing.assert_allclose(
            moments.covariance().numpy(), moments.scatter.numpy() / len(rows), rtol=1e-6
        )


def test_equal_weights_are_no_weights():
    rows = _rows()
    plain, ones, eights = Moments(ROW), Moments(ROW), Moments(ROW)
    plain.update(rows)
    ones.update(rows, torch.ones(len(rows)))
    eights.update(rows, torch.full((len(rows),), 8.0))
    torch.testing.assert_close(ones.mean, plain.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ones.scatter, plain.scatter, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(eights.mean, plain.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(eights.scatter, 8 * plain.scatter, rtol=1e-4, atol=1e-1)


def test_weighted_moments_merge_as_one_stream():
    rows = _rows()
    weights = 2.0 ** torch.randint(-5, 11, (len(rows),), generator=torch.Generator().manual_seed(6))
    whole, left, right = Moments(ROW), Moments(ROW), Moments(ROW)
    whole.update(rows, weights)
    left.update(rows[:300], weights[:300])
    right.update(rows[300:], weights[300:])
    left.merge(right)
    left.merge(Moments(ROW))
    assert (left.count, left.weight) == (whole.count, pytest.approx(whole.weight))
    torch.testing.assert_close(left.mean, whole.mean, rtol=1e-5, atol=1e-5)
    difference = float((left.scatter - whole.scatter).abs().max())
    assert difference < 1e-5 * float(whole.scatter.abs().max())
