from __future__ import annotations

import pytest
import torch

from dynamo_kvtc.calibration.fit import FitMethod, fit_basis
from dynamo_kvtc.errors import CalibrationError


def _covariance(row: int = 120) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    q = torch.linalg.qr(torch.randn(row, row, generator=generator)).Q
    spectrum = 100 * 0.9 ** torch.arange(row, dtype=torch.float32)
    return (q * spectrum) @ q.T


@pytest.mark.parametrize("method", [FitMethod.EIGH, FitMethod.RANDOMISED])
def test_a_basis_is_orthonormal_and_diagonalises(method):
    covariance = _covariance()
    basis = fit_basis(covariance, method=method, rank=30)
    assert basis.components.shape == (30, 120)
    torch.testing.assert_close(basis.components @ basis.components.T, torch.eye(30), atol=1e-4, rtol=0)
    diagonal = basis.components @ covariance @ basis.components.T
    torch.testing.assert_close(diagonal, torch.diag(basis.variances), atol=2e-3, rtol=1e-3)
    assert (basis.variances.diff() <= 1e-4).all()
    assert basis.total_variance == pytest.approx(float(covariance.trace()), rel=1e-5)


def test_the_randomised_fit_finds_the_leading_components():
    covariance = _covariance()
    exact = fit_basis(covariance, method=FitMethod.EIGH, rank=20)
    randomised = fit_basis(covariance, method=FitMethod.RANDOMISED, rank=20)
    torch.testing.assert_close(randomised.variances, exact.variances, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(randomised.components, exact.components, rtol=0, atol=5e-3)


@pytest.mark.parametrize("method", [FitMethod.EIGH, FitMethod.RANDOMISED])
def test_a_fit_repeats_exactly_and_signs_are_fixed(method):
    covariance = _covariance()
    first = fit_basis(covariance, method=method, rank=30, seed=4)
    second = fit_basis(covariance, method=method, rank=30, seed=4)
    assert torch.equal(first.components, second.components)
    largest = first.components.gather(1, first.components.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()


def test_auto_is_exact_for_small_rows_and_randomised_for_large():
    assert FitMethod.AUTO.resolve(5760) is FitMethod.EIGH
    assert FitMethod.AUTO.resolve(32_768) is FitMethod.RANDOMISED
    assert FitMethod.EIGH.resolve(32_768) is FitMethod.EIGH


@pytest.mark.parametrize("covariance", [torch.zeros(4, 4), torch.full((4, 4), torch.nan)])
def test_a_covariance_without_information_is_refused(covariance):
    with pytest.raises(CalibrationError, match="do not vary"):
        fit_basis(covariance)
