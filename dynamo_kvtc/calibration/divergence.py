"""How far a model's next-token predictions move when its cache is replaced."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["DistributionSums"]

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
