"""One side of one layer group under one plan: what a profile provides to `TransformCodec`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from dynamo_kvtc.codec.transform import SideTransform

__all__ = ["Chunks", "SideCodec"]

#: Plain sizes of the chunks of a section, each divided into runs: bytes of alike statistics.
Chunks = Sequence[Sequence[int]]


class SideCodec(ABC):
    """Rows of keys or values to payload bytes and back.

    Parameters
    ----------
    transform : SideTransform
        Rows to coefficients and back.
    """

    def __init__(self, transform: SideTransform) -> None:
        self._transform = transform

    def warm_up(self) -> None:
        """Make ready what the first `encode` and `reconstruct` would otherwise wait for."""
        self._transform.warm_up()

    @abstractmethod
    def max_chunks(self, tokens: int) -> Chunks:
        """Return the chunks of the largest payload of some coded tokens, none of them of size 0.

        Each payload of as many tokens has as many chunks.
        """

    @abstractmethod
    def payload_bounds(self, tokens: int) -> tuple[int, int]:
        """Return the least and the most bytes of a payload of some coded tokens."""

    @abstractmethod
    def encode(self, rows: torch.Tensor) -> tuple[NDArray[np.uint8], Chunks]:
        """Return the payload of float32 rows ``[tokens, row]``, and the chunks to cut it into.

        Raises
        ------
        EncodeRangeError
            If the rows hold NaN, infinity, or what the payload cannot carry.
        """

    @abstractmethod
    def decode(self, payload: NDArray[np.uint8], tokens: int) -> torch.Tensor:
        """Return the coefficients of a payload, ``[tokens, stored]`` in the compute dtype.

        Raises
        ------
        BitstreamError
            The subclass that names what is wrong with the payload.
        """

    def reconstruct(self, coefficients: torch.Tensor, layer: int) -> torch.Tensor:
        """Return one layer of the group, float32 ``[tokens, layer_size]``, from `decode`'s result."""
        return self._transform.inverse(coefficients, layer)
