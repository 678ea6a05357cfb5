"""How far decoded rows lie from original ones."""

from __future__ import annotations

import math

import torch

__all__ = ["RowErrorSums"]


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
