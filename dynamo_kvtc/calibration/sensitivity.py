"""What the model notices: a metric for rows, and the importance of tokens.

A small error ``e`` in the keys or values of a token changes the next-token distributions of later tokens
by ``KL = e' F e / 2`` nats, ``F`` being the Fisher information of the loss (Amari 1998). Here ``F`` is
taken as one block per layer and head, times one factor per token. The blocks' roots are the metric in
which the rd profile looks for its basis; the tokens' factor is predicted from their rows
(`dynamo_kvtc.codec.importance`). Both come from a sample of rows and of the loss's gradients with
respect to them (`dynamo_kvtc.calibration.sensitivity_capture`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dynamo_kvtc.calibration.fit import FitMethod, fit_basis
from dynamo_kvtc.codec.importance import predict_levels, scales
from dynamo_kvtc.errors import CalibrationError

__all__ = ["SideSample", "SideSensitivity", "apply_blocks", "fit_sensitivity", "root_and_inverse"]

#: Share of each block that is replaced by its mean eigenvalue (Ledoit and Wolf 2004 call it shrinkage), so
#: that no direction is taken for harmless because the sample happened not to need it.
SHRINKAGE = 0.02

#: Principal components of the rows that importance is predicted from: enough for nearly all of what more
#: would explain, few enough for some thousands of rows.
FEATURES = 256

#: Components with less than this share of the largest one's variance do not vary, in float32.
NEGLIGIBLE = 1e-6

#: Ridge penalty of the prediction, in rows: the features have unit variance.
RIDGE = 1000.0


@dataclass(frozen=True, eq=False)
class SideSample:
    """Rows of one side of one layer group and the loss's gradients with respect to them.

    Attributes
    ----------
    rows, gradients : torch.Tensor
        Floating ``[tokens, row]``.
    documents : torch.Tensor
        int64 ``[tokens]``: which document each row is from.
    distances : torch.Tensor
        float32 ``[tokens]``: tokens between the row and the first one whose loss was looked at.
    """

    rows: torch.Tensor
    gradients: torch.Tensor
    documents: torch.Tensor
    distances: torch.Tensor


@dataclass(frozen=True, eq=False)
class SideSensitivity:
    """Metric and prediction of importance of one side of one layer group.

    Attributes
    ----------
    metric, inverse : torch.Tensor
        float32 ``[heads, head_size, head_size]``, symmetric, each other's inverses.
    mean : torch.Tensor
        float32 ``[row]``: what is subtracted from rows before importance is predicted.
    weights, bias : torch.Tensor, float
        For `dynamo_kvtc.codec.importance.predict_levels`.
    explained : float
        Share of the variance of the logarithm of importance, within documents, that is predicted.
    """

    metric: torch.Tensor
    inverse: torch.Tensor
    mean: torch.Tensor
    weights: torch.Tensor
    bias: float
    explained: float

    def scales(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the factor of each of the rows: float32 ``[tokens]``."""
        return scales(predict_levels(rows - self.mean, self.weights, self.bias))


def fit_sensitivity(sample: SideSample, head_size: int) -> SideSensitivity:
    """Fit metric and importance.

    Importance is what is left of a token's squared gradient, measured in the metric, beyond what its
    document and its distance from the loss explain. The metric is then fitted again with each gradient
    divided by its token's predicted scale, so that a few tokens do not decide it alone.

    Parameters
    ----------
    sample : SideSample
        Some thousands of rows.
    head_size : int
        Channels of a head.

    Raises
    ------
    CalibrationError
        If gradients are all zero or not finite.
    """
    gradients = sample.gradients.float()
    mean = sample.rows.mean(0, dtype=torch.float32)
    centred = sample.rows.float() - mean
    metric, inverse = root_and_inverse(fisher_blocks(gradients, head_size))
    target = apply_blocks(gradients, inverse).square().sum(1).clamp_min(1e-30).log2()
    in_metric, explained = _regress(apply_blocks(centred, metric), target, sample)
    weights = apply_blocks(in_metric[None], metric)[0]
    predicted = centred @ weights
    bias = -float(predicted.mean())
    tamed = gradients / scales(predict_levels(centred, weights, bias))[:, None]
    metric, inverse = root_and_inverse(fisher_blocks(tamed, head_size))
    return SideSensitivity(metric, inverse, mean, weights, bias, explained)


def fisher_blocks(gradients: torch.Tensor, head_size: int) -> torch.Tensor:
    """Return the mean outer product of each head's gradients.

    Parameters
    ----------
    gradients : torch.Tensor
        float32 ``[tokens, row]``.

    Returns
    -------
    torch.Tensor
        float64 ``[heads, head_size, head_size]``.
    """
    heads = gradients.view(gradients.shape[0], -1, head_size).transpose(0, 1)
    return (heads.transpose(1, 2) @ heads).double() / gradients.shape[0]


def root_and_inverse(blocks: torch.Tensor, shrinkage: float = SHRINKAGE) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the symmetric roots of shrunk blocks and the roots' inverses.

    Parameters
    ----------
    blocks : torch.Tensor
        float64 ``[heads, size, size]``, symmetric, positive semi-definite.

    Returns
    -------
    tuple[torch.Tensor, torch.Tensor]
        float32, of the shape of `blocks`.

    Raises
    ------
    CalibrationError
        If a block is zero or not finite.
    """
    size = blocks.shape[-1]
    level = blocks.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
    if not (level > 0).all() or not blocks.isfinite().all():
        raise CalibrationError(
            "the loss does not depend on some head's keys or values, or its gradients are not finite; "
            "calibrate in float32 on longer documents"
        )
    shrunk = (1 - shrinkage) * blocks + shrinkage * level * torch.eye(size, dtype=blocks.dtype)
    strengths, vectors = torch.linalg.eigh(shrunk)
    roots = strengths.clamp_min(0).sqrt()[:, None, :]
    root = (vectors * roots) @ vectors.transpose(1, 2)
    inverse = (vectors / roots) @ vectors.transpose(1, 2)
    return root.float(), inverse.float()


def apply_blocks(rows: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Multiply each head of rows ``[tokens, row]`` by its symmetric block: float32 ``[tokens, row]``."""
    heads, size, _ = blocks.shape
    return torch.einsum("thc,hcd->thd", rows.view(-1, heads, size), blocks).reshape(rows.shape)


def _regress(rows: torch.Tensor, target: torch.Tensor, sample: SideSample) -> tuple[torch.Tensor, float]:
    """Fit ``target = rows @ weights + document + f(distance)`` by ridge regression on principal components.

    Returns
    -------
    tuple[torch.Tensor, float]
        Weights ``[row]``, and the share of the target's variance that they explain once document and
        distance are accounted for.
    """
    covariance = rows.T @ rows / rows.shape[0]
    basis = fit_basis(covariance, method=FitMethod.RANDOMISED, rank=min(FEATURES, *rows.shape))
    # Constant channels, and fewer rows than components, leave directions that hold rounding alone.
    varied = basis.variances > NEGLIGIBLE * basis.variances[0]
    directions = (basis.components[varied] / basis.variances[varied].sqrt()[:, None]).T
    features = _within_documents(rows @ directions, sample.documents)
    target = _within_documents(target[:, None], sample.documents)[:, 0]
    log_distance = sample.distances.clamp_min(1).log2()
    trend = _within_documents(torch.stack([log_distance, log_distance.square()], 1), sample.documents)
    features, target = _without(features, trend), _without(target[:, None], trend)[:, 0]
    normal = features.T @ features + RIDGE * torch.eye(features.shape[1])
    solution = torch.linalg.solve(normal, features.T @ target)
    left = target - features @ solution
    explained = 1 - float(left.square().sum() / target.square().sum().clamp_min(1e-30))
    return directions @ solution, explained


def _within_documents(columns: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    """Subtract from each document's entries of ``[tokens, columns]`` their mean."""
    count = int(documents.max()) + 1
    sums = columns.new_zeros(count, columns.shape[1]).index_add_(0, documents, columns)
    sizes = torch.bincount(documents, minlength=count).clamp_min(1)[:, None]
    return columns - (sums / sizes)[documents]


def _without(columns: torch.Tensor, nuisance: torch.Tensor) -> torch.Tensor:
    """Remove from columns what a linear function of `nuisance` explains."""
    # torch's default driver pivots by memory that it does not set, so its last bits change from run to run.
    fit = torch.linalg.lstsq(nuisance, columns, driver="gelsd")
    explained: torch.Tensor = nuisance @ fit.solution
    return columns - explained
