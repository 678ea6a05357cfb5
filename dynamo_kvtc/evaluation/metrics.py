"""What is compared: next-token distributions, and decoded rows with original ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

__all__ = ["DistributionSums", "RowErrorSums"]

#: Tokens compared at a time, so that float64 copies of the logits stay small whatever the vocabulary.
_TOKENS_AT_ONCE = 32


@dataclass(slots=True)
class DistributionSums:
    """Running comparison of a model's predictions with those over the uncompressed cache.

    Attributes
    ----------
    tokens : int
        Scored tokens so far.
    kl, nll, reference_nll : float
        Sums over the scored tokens, in nats.
    agreements : int
        Tokens for which both distributions have the same most likely next token.
    """

    tokens: int = 0
    kl: float = 0.0
    nll: float = 0.0
    reference_nll: float = 0.0
    agreements: int = 0

    def add(self, reference: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """Compare predictions.

        The divergence is ``KL(reference || compressed) = sum_v p_v (log p_v - log q_v)`` in float64.

        Parameters
        ----------
        reference, logits : torch.Tensor
            Logits over the uncompressed and over the compressed cache, ``[tokens, vocabulary]``.
        targets : torch.Tensor
            The tokens that really follow, int64 ``[tokens]``.
        """
        for first in range(0, targets.numel(), _TOKENS_AT_ONCE):
            rows = slice(first, first + _TOKENS_AT_ONCE)
            log_p = reference[rows].double().log_softmax(-1)
            log_q = logits[rows].double().log_softmax(-1)
            index = targets[rows, None]
            self.kl += float((log_p.exp() * (log_p - log_q)).sum())
            self.nll -= float(log_q.gather(1, index).sum())
            self.reference_nll -= float(log_p.gather(1, index).sum())
            self.agreements += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
        self.tokens += targets.numel()


class RowErrorSums:
    """Running relative error of rows (one token, all layers and heads) against their originals.

    The error is ``sqrt(sum |x - y|^2 / sum |x - mean|^2)``, the mean being that of the originals seen:
    0 for exact rows, 1 for rows all replaced by their mean.

    Parameters
    ----------
    row_size : int
        Elements of a row.
    """

    def __init__(self, row_size: int) -> None:
        self._count = 0
        self._squared_error = 0.0
        self._squares = 0.0
        self._sum = torch.zeros(row_size, dtype=torch.float64)

    def add(self, original: torch.Tensor, decoded: torch.Tensor) -> None:
        """Compare rows ``[tokens, row_size]``, any floating dtype."""
        rows = original.double()
        self._count += rows.shape[0]
        self._squared_error += float((rows - decoded.double()).square().sum())
        self._squares += float(rows.square().sum())
        self._sum += rows.sum(0)

    @property
    def relative_error(self) -> float:
        """The error of everything added; 0 if the originals do not vary and nothing differs."""
        if self._squared_error == 0:
            return 0.0
        variation = self._squares - float(self._sum.square().sum()) / self._count
        return math.sqrt(self._squared_error / variation) if variation > 0 else math.inf
