"""Bases from covariances: the full eigen-decomposition, or a randomised one for large rows."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

from dynamo_kvtc.errors import CalibrationError

__all__ = ["EIGH_ROW_LIMIT", "MAXIMUM_RANK", "Basis", "FitMethod", "fit_basis"]

#: Rows up to this size get the full decomposition, which grows with the cube of the size.
EIGH_ROW_LIMIT = 8192

#: Largest rank of a randomised fit (KVTC, section 4).
MAXIMUM_RANK = 10_000

#: Subspace iterations of the randomised fit (KVTC, section 4, after Halko et al. 2011).
ITERATIONS = 8

#: Directions carried beyond the wanted rank, so that the last wanted ones are accurate (Halko et al.).
OVERSAMPLING = 32


class FitMethod(str, Enum):
    """How a covariance is decomposed; AUTO chooses by the row's size."""

    AUTO = "auto"
    EIGH = "eigh"
    RANDOMISED = "randomised"

    def resolve(self, row: int) -> FitMethod:
        """Return the method that is used for rows of this size."""
        if self is not FitMethod.AUTO:
            return self
        return FitMethod.EIGH if row <= EIGH_ROW_LIMIT else FitMethod.RANDOMISED


@dataclass(frozen=True, eq=False)
class Basis:
    """Principal components by falling variance.

    Attributes
    ----------
    components : torch.Tensor
        float32 ``[rank, row]``, orthonormal rows; the largest entry of each, by magnitude, is positive.
    variances : torch.Tensor
        float32 ``[rank]``, not negative.
    total_variance : float
        Trace of the covariance, all components counted.
    """

    components: torch.Tensor
    variances: torch.Tensor
    total_variance: float


def fit_basis(
    covariance: torch.Tensor,
    *,
    method: FitMethod = FitMethod.AUTO,
    rank: int = MAXIMUM_RANK,
    seed: int = 0,
) -> Basis:
    """Decompose a covariance.

    Parameters
    ----------
    covariance : torch.Tensor
        float32 ``[row, row]``, symmetric.
    method : FitMethod
        EIGH is exact; RANDOMISED finds the leading `rank` components only.
    rank : int
        Components wanted at most.
    seed : int
        Seed of the randomised fit; the same seed gives the same basis.

    Raises
    ------
    CalibrationError
        If the covariance is not finite or has no variance at all.
    """
    total = float(covariance.diagonal().sum(dtype=torch.float64))
    if not covariance.isfinite().all() or total <= 0:
        raise CalibrationError("the captured rows do not vary or are not finite: calibrate on real text")
    row = covariance.shape[0]
    rank = min(rank, row)
    if method.resolve(row) is FitMethod.EIGH or rank + OVERSAMPLING >= row:
        variances, vectors = torch.linalg.eigh(covariance)
    else:
        variances, vectors = _randomised(covariance, rank, seed)
    components = vectors.T.flip(0)[:rank].contiguous()
    return Basis(_with_fixed_signs(components), variances.flip(0)[:rank].clamp_min(0).contiguous(), total)


def _randomised(covariance: torch.Tensor, rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Subspace iteration, then Rayleigh-Ritz (Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.3).

    Returns
    -------
    tuple[torch.Tensor, torch.Tensor]
        Eigenvalues in rising order ``[rank + OVERSAMPLING]`` and their vectors as columns.
    """
    generator = torch.Generator().manual_seed(seed)
    subspace = torch.randn(covariance.shape[0], rank + OVERSAMPLING, generator=generator)
    for _ in range(ITERATIONS):
        subspace = torch.linalg.qr(covariance @ subspace).Q
    variances, vectors = torch.linalg.eigh(subspace.T @ covariance @ subspace)
    return variances, subspace @ vectors


def _with_fixed_signs(components: torch.Tensor) -> torch.Tensor:
    """Turn each component so that its largest entry is positive; the sign is free otherwise."""
    largest = components.abs().argmax(dim=1, keepdim=True)
    return torch.where(components.gather(1, largest) < 0, -components, components)
