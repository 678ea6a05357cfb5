"""Importance of tokens: how finely the rd profile quantises each of them.

Later tokens attend to a few earlier ones a hundred times more than to most, and what a token's keys and
values look like says much about which. A linear function of its row, fitted to the sensitivity of the
model's loss (`dynamo_kvtc.calibration.sensitivity`), predicts the logarithm of the importance; the token's
coefficients are multiplied by its square root before they are quantised with the common step. The level
travels with the token, so a decoder needs no prediction.
"""

from __future__ import annotations

import torch

__all__ = ["LEVELS", "MAX_LEVEL", "MIN_LEVEL", "predict_levels", "scales"]

#: Range of levels, powers of two of the importance; the 16 of them fit into half a byte.
MIN_LEVEL, MAX_LEVEL = -5, 10
LEVELS = MAX_LEVEL - MIN_LEVEL + 1

# From a table, so that they are the same everywhere to the last bit.
_SCALES = torch.tensor([2.0 ** (level / 2) for level in range(MIN_LEVEL, MAX_LEVEL + 1)])


def predict_levels(centred: torch.Tensor, weights: torch.Tensor, bias: float) -> torch.Tensor:
    """Predict the importance of tokens.

    Parameters
    ----------
    centred : torch.Tensor
        float32 ``[tokens, row]``, rows without the mean.
    weights, bias : torch.Tensor, float
        float32 ``[row]`` and a constant: ``log2(importance) = centred @ weights + bias``.

    Returns
    -------
    torch.Tensor
        int8 ``[tokens]``, the logarithm rounded half to even and clamped to `MIN_LEVEL` .. `MAX_LEVEL`.
    """
    return (centred @ weights).add_(bias).round_().clamp_(MIN_LEVEL, MAX_LEVEL).to(torch.int8)


def scales(levels: torch.Tensor) -> torch.Tensor:
    """Return the factors of the tokens' coefficients, ``2 ** (level / 2)``: float32 ``[tokens]``."""
    return _SCALES[levels.long() - MIN_LEVEL]
