"""Basis of the rd profile: principal components of rows weighted by importance, in the model's metric."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dynamo_kvtc.calibration.fit import FitMethod, fit_basis
from dynamo_kvtc.calibration.sensitivity import SideSensitivity, apply_blocks
from dynamo_kvtc.calibration.statistics import Moments
from dynamo_kvtc.codec.importance import predict_levels, scales
from dynamo_kvtc.errors import CalibrationError

__all__ = ["RdBasis", "fit_rd_basis", "load_rd_basis", "save_rd_basis"]


@dataclass(frozen=True, eq=False)
class RdBasis:
    """One side of one layer group, all but its plans; see `dynamo_kvtc.codec.parameters.RdSideParameters`.

    Attributes
    ----------
    mean, importance : torch.Tensor
        float32 ``[row]``.
    importance_bias : float
        Goes with `importance`.
    metric, inverse : torch.Tensor
        float32 ``[heads, head_size, head_size]``.
    basis : torch.Tensor
        ``[components, row]`` in the dtype in which it is stored.
    variances : torch.Tensor
        float32 ``[components]``, of scaled coefficients.
    total_variance : float
        Of all components.
    """

    mean: torch.Tensor
    importance: torch.Tensor
    importance_bias: float
    metric: torch.Tensor
    inverse: torch.Tensor
    basis: torch.Tensor
    variances: torch.Tensor
    total_variance: float

    def scales(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the factor of each of the rows: float32 ``[tokens]``."""
        return scales(predict_levels(rows - self.mean, self.importance, self.importance_bias))

    def coefficients(self, rows: torch.Tensor) -> torch.Tensor:
        """Return scaled coefficients of rows ``[tokens, row]``: float32 ``[tokens, components]``."""
        in_metric = apply_blocks(rows - self.mean, self.metric)
        return (in_metric @ self.basis.float().T) * self.scales(rows)[:, None]

    def reconstruct(self, coefficients: torch.Tensor, components: torch.Tensor) -> torch.Tensor:
        """Return centred rows ``[tokens, row]`` from unscaled coefficients of some components."""
        return apply_blocks(coefficients @ self.basis[components].float(), self.inverse)


def fit_rd_basis(
    moments: Moments,
    sensitivity: SideSensitivity,
    *,
    method: FitMethod,
    seed: int,
    basis_dtype: torch.dtype,
) -> RdBasis:
    """Fit the basis.

    Parameters
    ----------
    moments : Moments
        Of ``apply_blocks(rows - sensitivity.mean, sensitivity.metric)``, each row weighted with its
        squared scale.
    sensitivity : SideSensitivity
        Metric and importance.
    method, seed
        As for `dynamo_kvtc.calibration.fit.fit_basis`.
    basis_dtype : torch.dtype
        In which the basis is stored.

    Raises
    ------
    CalibrationError
        If the rows do not vary or are not finite.
    """
    basis = fit_basis(moments.covariance(), method=method, seed=seed)
    # The mean that leaves the least to code is the weighted one; importance is told of the difference.
    shift = apply_blocks(moments.mean.float()[None], sensitivity.inverse)[0]
    return RdBasis(
        mean=sensitivity.mean + shift,
        importance=sensitivity.weights,
        importance_bias=sensitivity.bias + float(shift @ sensitivity.weights),
        metric=sensitivity.metric,
        inverse=sensitivity.inverse,
        basis=basis.components.to(basis_dtype),
        variances=basis.variances,
        total_variance=basis.total_variance,
    )


_TENSORS = ("mean", "importance", "metric", "inverse", "basis", "variances")


def save_rd_basis(path: Path, basis: RdBasis) -> None:
    """Keep a basis, so that an interrupted calibration need not fit it again."""
    numbers = {"importance_bias": basis.importance_bias, "total_variance": basis.total_variance}
    scratch = path.with_suffix(".partial")
    tensors = {name: getattr(basis, name).contiguous() for name in _TENSORS}
    save_file(tensors, scratch, metadata={"numbers": json.dumps(numbers)})
    scratch.replace(path)


def load_rd_basis(path: Path) -> RdBasis:
    """Read what `save_rd_basis` wrote.

    Raises
    ------
    CalibrationError
        If the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            numbers = json.loads((file.metadata() or {})["numbers"])
            return RdBasis(**{name: file.get_tensor(name) for name in _TENSORS}, **numbers)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise CalibrationError(
            f"the saved state {path} is damaged ({error}); remove it and calibrate again"
        ) from error
