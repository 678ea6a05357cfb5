"""Random rotation and a scalar quantiser, as TurboQuant: no calibration, no scales but one norm a vector.

Each head vector is divided by its norm, which is stored in 16 bits, and turned by a fixed random orthogonal
matrix. Its coordinates are then nearly independent and normal with variance ``1 / head_size``, whatever the
vector was, so that one code book, the Lloyd-Max quantiser of the normal distribution, serves all of them.

Zandieh et al., "TurboQuant: online vector quantization with near-optimal distortion rate", arXiv 2504.19874,
the quantiser for mean squared error, at whole numbers of bits.
"""

from __future__ import annotations

import math
from functools import cache

import torch

from benchmarks.quality.codecs.base import (
    BaselineCodec,
    CodecFamily,
    CodecInputs,
    DocumentCodec,
    StoredKv,
)

__all__ = ["FAMILY", "RotationCodec", "lloyd_max_normal"]

_BITS = (4, 3, 2)

_NORM_BYTES = 2

#: More than the quantiser of 4 bits needs until nothing moves in float64.
_LLOYD_STEPS = 3000


class RotationCodec(BaselineCodec):
    """Rotated head vectors, quantised coordinate by coordinate.

    Parameters
    ----------
    bits : int
        Bits of a coordinate.
    seed : int
        Of the rotation, which is the same for all heads.
    """

    def __init__(self, bits: int, seed: int = 0) -> None:
        self.family = "rotation"
        self.setting = f"{bits} bits"
        self._bits = bits
        self._seed = seed

    def store_tokens(self, keys: torch.Tensor, values: torch.Tensor, first_position: int) -> StoredKv:
        """Encode tokens behind the sinks; see `BaselineCodec.store_tokens`."""
        size = keys.shape[-1]
        vectors = (keys.numel() + values.numel()) // size
        vector_bytes = -(-size * self._bits // 8) + _NORM_BYTES
        return StoredKv(self._round_trip(keys), self._round_trip(values), vectors * vector_bytes)

    def _round_trip(self, x: torch.Tensor) -> torch.Tensor:
        size = x.shape[-1]
        rotation = _random_rotation(size, self._seed)
        codebook = lloyd_max_normal(self._bits).float() / math.sqrt(size)
        borders = (codebook[1:] + codebook[:-1]) / 2
        norm = x.float().norm(dim=-1, keepdim=True)
        # Zero vectors have no direction; any will do, as their stored norm is zero.
        coordinates = x.float() / norm.clamp(min=torch.finfo(torch.float32).tiny) @ rotation.T
        symbols = torch.bucketize(coordinates, borders)
        decoded: torch.Tensor = (codebook[symbols] @ rotation * norm.half().float()).to(x.dtype)
        return decoded


@cache
def lloyd_max_normal(bits: int) -> torch.Tensor:
    """Return the code book of least squared error for the standard normal distribution.

    Lloyd's conditions, iterated: a border lies half-way between two levels, and a level is the mean of its
    cell, ``(phi(a) - phi(b)) / (Phi(b) - Phi(a))`` between borders a and b (Max, 1960).

    Returns
    -------
    torch.Tensor
        float64 ``[2^bits]``, ascending.
    """
    levels: torch.Tensor = torch.special.ndtri((torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits)
    infinity = torch.tensor([math.inf], dtype=torch.float64)
    for _ in range(_LLOYD_STEPS):
        borders = torch.cat((-infinity, (levels[1:] + levels[:-1]) / 2, infinity))
        density = (-borders.square() / 2).exp() / math.sqrt(2 * math.pi)
        levels = -density.diff() / torch.special.ndtr(borders).diff()
    return levels


@cache
def _random_rotation(size: int, seed: int) -> torch.Tensor:
    """Return an orthogonal matrix drawn evenly from all of them, float32 ``[size, size]``."""
    generator = torch.Generator().manual_seed(seed)
    gauss = torch.randn((size, size), generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gauss)
    rotation: torch.Tensor = (q * r.diagonal().sign()).float()
    return rotation


def _build(inputs: CodecInputs) -> list[DocumentCodec]:
    return [RotationCodec(bits) for bits in _BITS]


FAMILY = CodecFamily("rotation", _build)
