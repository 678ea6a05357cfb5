"""What an evaluation found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

from dynamo_kvtc.evaluation.protocol import EvaluationProtocol

__all__ = ["EvaluationReport", "EvaluationRow", "ratio_at_kl"]


@dataclass(frozen=True, slots=True)
class EvaluationRow:
    """One codec, measured over all documents.

    Attributes
    ----------
    profile : str
        Profile of the codec.
    nominal_ratio : float
        What the plan was made for: of real streams with rd, before entropy coding with kvtc.
    ratio : float
        16-bit bytes of the stored tokens, sinks included, over all bytes of their streams.
    ratio_total : float
        16-bit bytes of the whole contexts over everything they occupy: streams with the sinks in them,
        and the recent window at 16 bits.
    kl : float
        Divergence of the next-token distribution from that over the uncompressed cache, mean over the
        scored tokens, in nats.
    kl_low, kl_high : float
        Its 95 % interval over documents.
    top1 : float
        Share of scored tokens whose most likely next token is the same.
    top1_low, top1_high : float
        Its 95 % interval over documents.
    nll, nll_delta : float
        Mean negative log-likelihood of the text in nats, and what it is above that over the uncompressed
        cache.
    nll_delta_low, nll_delta_high : float
        The 95 % interval of the difference over documents.
    key_error, value_error : float
        Relative errors of pre-RoPE keys and of values at the replaced positions (see `RowErrorSums`).
    encode_tokens_per_s, decode_tokens_per_s : float
        Speed of the codec calls, by the median document.
    """

    profile: str
    nominal_ratio: float
    ratio: float
    ratio_total: float
    kl: float
    kl_low: float
    kl_high: float
    top1: float
    top1_low: float
    top1_high: float
    nll: float
    nll_delta: float
    nll_delta_low: float
    nll_delta_high: float
    key_error: float
    value_error: float
    encode_tokens_per_s: float
    decode_tokens_per_s: float


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """The rows, and what they hold for.

    Attributes
    ----------
    architecture, dtype : str
        The model's class, and the dtype of its KV cache.
    artifact_id : str
        Hex id of the artifact.
    protocol : EvaluationProtocol
        How documents were cut.
    reference_nll : float
        Mean negative log-likelihood over the uncompressed cache, in nats.
    rows : tuple[EvaluationRow, ...]
        In the order of the codecs.
    """

    architecture: str
    dtype: str
    artifact_id: str
    protocol: EvaluationProtocol
    reference_nll: float
    rows: tuple[EvaluationRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON-ready values."""
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        return plain | {"protocol": asdict(self.protocol), "rows": [asdict(row) for row in self.rows]}


def ratio_at_kl(rows: Sequence[EvaluationRow], kl: float) -> float | None:
    """Return the ratio that a codec reaches at a divergence, between two of its plans.

    Parameters
    ----------
    rows : Sequence[EvaluationRow]
        Of one codec on the same documents.
    kl : float
        In nats.

    Returns
    -------
    float or None
        On straight lines between the rows, both axes logarithmic; None beyond them.
    """
    points = sorted((row.kl, row.ratio) for row in rows if row.kl > 0)
    for (low_kl, low_ratio), (high_kl, high_ratio) in pairwise(points):
        if low_kl <= kl <= high_kl and low_kl < high_kl:
            share = math.log(kl / low_kl) / math.log(high_kl / low_kl)
            return math.exp(math.log(low_ratio) + share * math.log(high_ratio / low_ratio))
    return None
