"""Fit the keys or values of one layer group: basis, bit plans and the errors to expect of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dynamo_kvtc.calibration.allocate import budget_bits, measure_errors, plan_bits
from dynamo_kvtc.calibration.artifact_writer import FittedSide
from dynamo_kvtc.calibration.fit import FitMethod, fit_basis
from dynamo_kvtc.calibration.statistics import Moments
from dynamo_kvtc.codec.plan import BitPlan, PlanGroup, QuantType
from dynamo_kvtc.codec.quantiser import simulate
from dynamo_kvtc.errors import CalibrationError

__all__ = ["fit_side", "layer_errors", "load_side", "save_side"]


def fit_side(
    moments: Moments,
    sample: torch.Tensor,
    ratios: Mapping[int, float],
    *,
    layers: int,
    method: FitMethod,
    seed: int,
    basis_dtype: torch.dtype,
) -> FittedSide:
    """Find basis and bit plans.

    Parameters
    ----------
    moments : Moments
        Of all rows.
    sample : torch.Tensor
        float32 ``[tokens, row]``, rows on which quantisation is simulated.
    ratios : Mapping[int, float]
        Nominal ratio by plan id.
    layers : int
        Layers in the group; the row is divided evenly among them.
    method, seed
        As for `dynamo_kvtc.calibration.fit.fit_basis`.
    basis_dtype : torch.dtype
        In which the basis is stored.

    Raises
    ------
    CalibrationError
        If the rows have no variance, or a ratio is so high that its plan would store nothing.
    """
    basis = fit_basis(moments.covariance(), method=method, seed=seed)
    mean = moments.mean.float()
    centred = sample - mean
    row = mean.numel()
    table = measure_errors(basis.components @ centred.T)
    found = plan_bits(table, [budget_bits(row, ratio) for ratio in ratios.values()])
    plans = dict(zip(ratios, found, strict=True))
    for plan_id, plan in plans.items():
        if plan.rank == 0:
            raise CalibrationError(
                f"at ratio {ratios[plan_id]:g} the {budget_bits(row, ratios[plan_id])} bits a token that "
                f"{layers} layers have store nothing; ask for a lower ratio or join more layers in a group"
            )
    rank = max(plan.rank for plan in found)
    stored = basis.components[:rank].to(basis_dtype)
    return FittedSide(
        mean=mean,
        basis=stored,
        variances=basis.variances[:rank],
        total_variance=basis.total_variance,
        plans=plans,
        errors={
            plan_id: layer_errors(centred, _decode(centred, stored.float(), plan), layers)
            for plan_id, plan in plans.items()
        },
    )


def _decode(centred: torch.Tensor, basis: torch.Tensor, plan: BitPlan) -> torch.Tensor:
    """Return what centred rows decode to after quantisation by `plan`."""
    coefficients = centred @ basis[: plan.rank].T
    decoded = torch.zeros_like(coefficients)
    for group in plan.groups:
        part = slice(group.start, group.stop)
        decoded[:, part] = simulate(coefficients[:, part], group.type)
    return decoded @ basis[: plan.rank]


def layer_errors(centred: torch.Tensor, decoded: torch.Tensor, layers: int) -> tuple[float, ...]:
    """Return each layer's squared error over its squared size; rows ``[tokens, row]``, both centred."""
    missed = decoded - centred
    errors = _layer_energy(missed, layers) / _layer_energy(centred, layers).clamp_min(1e-30)
    return tuple(errors.tolist())


def _layer_energy(rows: torch.Tensor, layers: int) -> torch.Tensor:
    per_layer = rows.view(rows.shape[0], layers, -1)
    return per_layer.square().sum(dim=(0, 2), dtype=torch.float64)


def save_side(path: Path, side: FittedSide) -> None:
    """Keep a fitted side, so that an interrupted calibration need not fit it again."""
    record = {
        "total_variance": side.total_variance,
        "plans": {
            plan_id: [(group.start, group.size, int(group.type)) for group in plan.groups]
            for plan_id, plan in side.plans.items()
        },
        "errors": side.errors,
    }
    tensors = {"mean": side.mean, "basis": side.basis.contiguous(), "variances": side.variances.contiguous()}
    scratch = path.with_suffix(".partial")
    save_file(tensors, scratch, metadata={"record": json.dumps(record)})
    scratch.replace(path)


def load_side(path: Path) -> FittedSide:
    """Read what `save_side` wrote.

    Raises
    ------
    CalibrationError
        If the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {})["record"])
            tensors = {name: file.get_tensor(name) for name in ("mean", "basis", "variances")}
        return FittedSide(
            **tensors,
            total_variance=record["total_variance"],
            plans={
                int(plan_id): BitPlan(
                    tuple(PlanGroup(start, size, QuantType(type_)) for start, size, type_ in groups)
                )
                for plan_id, groups in record["plans"].items()
            },
            errors={int(plan_id): tuple(errors) for plan_id, errors in record["errors"].items()},
        )
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise CalibrationError(
            f"the saved state {path} is damaged ({error}); remove it and calibrate again"
        ) from error
