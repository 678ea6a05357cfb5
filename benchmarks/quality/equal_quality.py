"""Bytes at equal quality: what one codec stores over what another does, where both diverge equally.

Each codec's settings are points of divergence and ratio over the same documents; between neighbouring points
the logarithm of the ratio is linear in the logarithm of the divergence. Levels of divergence that a codec's
own points do not enclose are left out, since nothing was measured there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.quality.measure import DocumentScore
from dynamo_kvtc.errors import EvaluationError
from dynamo_kvtc.evaluation.bootstrap import Interval, percentiles, resample

__all__ = ["LEVELS", "EqualQuality", "bytes_at_equal_kl"]

#: Levels of next-token divergence, in nats, at which codecs are compared.
LEVELS = (0.004, 0.015, 0.03)

_Sums = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class EqualQuality:
    """Two codecs at one level of divergence.

    Attributes
    ----------
    codec, against : str
        The two.
    kl : float
        The level, in nats.
    bytes : Interval
        Bytes of `codec` over bytes of `against`, with its interval over documents.
    """

    codec: str
    against: str
    kl: float
    bytes: Interval


def bytes_at_equal_kl(
    scores: Sequence[DocumentScore], codec: str, against: str, levels: Sequence[float] = LEVELS
) -> list[EqualQuality]:
    """Compare two codecs at levels of divergence.

    Parameters
    ----------
    scores : Sequence[DocumentScore]
        Of one model and task; both codecs have one for each document and setting.
    codec, against : str
        Names of codecs.

    Returns
    -------
    list[EqualQuality]
        One for each level that the points of both codecs enclose. Documents are resampled alike for both;
        where a resample's points end short of a level, their last stretch is followed on to it.

    Raises
    ------
    EvaluationError
        If the codecs were not measured on the same documents.
    """
    curves = [_Curve.of(scores, name) for name in (codec, against)]
    documents = curves[0].documents
    if documents != curves[1].documents:
        raise EvaluationError(f"{codec} and {against} were not measured on the same documents")
    drawn = resample(len(documents))
    found = []
    for level in levels:
        if not all(curve.encloses(level) for curve in curves):
            continue
        own, other = (curve.log_ratio(level, None) for curve in curves)
        resampled = np.array(
            [curves[1].log_ratio(level, chosen) - curves[0].log_ratio(level, chosen) for chosen in drawn]
        )
        # A draw of documents that one codec stores without loss says nothing about equal divergence.
        resampled = resampled[np.isfinite(resampled)]
        interval = percentiles(float(np.exp(other - own)), np.exp(resampled))
        found.append(EqualQuality(codec, against, level, interval))
    return found


@dataclass(frozen=True)
class _Curve:
    """One codec's points: for each setting and document, divergence, tokens, raw and stored bytes."""

    documents: tuple[int, ...]
    sums: _Sums  # [settings, documents, 4]

    @classmethod
    def of(cls, scores: Sequence[DocumentScore], codec: str) -> _Curve:
        settings: dict[str, dict[int, tuple[float, ...]]] = {}
        for s in scores:
            if s.codec == codec:
                settings.setdefault(s.setting, {})[s.document] = (s.kl, s.tokens, s.raw_bytes, s.stored_bytes)
        if not settings:
            raise EvaluationError(f"there are no scores of codec {codec}")
        documents = sorted(next(iter(settings.values())))
        if any(sorted(points) != documents for points in settings.values()):
            raise EvaluationError(f"the settings of {codec} were not measured on the same documents")
        sums = np.array([[points[d] for d in documents] for points in settings.values()], dtype=np.float64)
        return cls(tuple(documents), sums)

    def points(self, chosen: NDArray[np.int64] | None) -> tuple[_Sums, _Sums]:
        """Return the logarithms of divergence, ascending, and of ratio; over all or chosen documents."""
        kl, tokens, raw, stored = (self.sums if chosen is None else self.sums[:, chosen]).sum(axis=1).T
        positive = kl > 0  # a codec without loss has no place on a logarithmic axis
        log_kl, log_ratio = np.log(kl[positive] / tokens[positive]), np.log(raw[positive] / stored[positive])
        order = np.argsort(log_kl)
        return log_kl[order], log_ratio[order]

    def encloses(self, level: float) -> bool:
        log_kl, _ = self.points(None)
        return len(log_kl) > 1 and bool(log_kl[0] <= np.log(level) <= log_kl[-1])

    def log_ratio(self, level: float, chosen: NDArray[np.int64] | None) -> float:
        x, y = self.points(chosen)
        if len(x) < 2:
            return float("nan")
        right = int(np.clip(np.searchsorted(x, np.log(level)), 1, len(x) - 1))
        slope = (y[right] - y[right - 1]) / (x[right] - x[right - 1])
        return float(y[right - 1] + slope * (np.log(level) - x[right - 1]))
