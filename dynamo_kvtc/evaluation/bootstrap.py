"""Confidence intervals over documents: the percentile bootstrap of a ratio of sums.

Documents are resampled whole, because tokens of one document stand and fall together; a mean over tokens is
then a ratio of two sums over documents (Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Interval", "percentiles", "ratio_interval", "resample"]

#: Resamples of the documents; the end of an interval then moves by a few per cent of its width at most.
RESAMPLES = 2000

#: Probability that an interval is meant to hold.
LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate, and the 95 % interval around it; no interval (low = mean = high) for one document."""

    mean: float
    low: float
    high: float


def resample(documents: int, *, resamples: int = RESAMPLES, seed: int = 0) -> NDArray[np.int64]:
    """Draw documents with replacement.

    Returns
    -------
    NDArray[np.int64]
        Indices ``[resamples, documents]``; the same for the same arguments, so that whatever is compared
        on the same documents is compared on the same resamples.
    """
    return np.random.default_rng(seed).integers(documents, size=(resamples, documents))


def ratio_interval(
    numerators: Sequence[float] | NDArray[np.float64], denominators: Sequence[float] | NDArray[np.float64]
) -> Interval:
    """Return ``sum(numerators) / sum(denominators)`` and its interval over documents.

    Parameters
    ----------
    numerators, denominators : Sequence[float]
        One of each for every document, such as a sum over its tokens, and their number; the denominators
        are positive.
    """
    above, below = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    drawn = resample(len(above))
    return percentiles(float(above.sum() / below.sum()), above[drawn].sum(axis=1) / below[drawn].sum(axis=1))


def percentiles(estimate: float, resampled: NDArray[np.float64]) -> Interval:
    """Return an estimate with the interval that its resamples span."""
    low, high = np.quantile(resampled, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Interval(estimate, float(low), float(high))
