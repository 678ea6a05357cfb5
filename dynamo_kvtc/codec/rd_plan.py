"""Plans of the rd profile: one step for everything, and per component how to round and reconstruct.

Owns the representation. How a plan is found belongs to `dynamo_kvtc.calibration`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch

from dynamo_kvtc.errors import ArtifactFormatError

__all__ = ["RdPlan", "SymbolClass"]


class SymbolClass(IntEnum):
    """How the symbols of a component are packed; components of a class lie together in a payload.

    A symbol beyond its class's limit is stored clamped, and once more, in full, among the escapes.
    """

    WIDE = 0  # int16: a plane of high bytes and a plane of low bytes
    BYTE = 1  # int8
    NIBBLE = 2  # two to a byte
    TRIT = 3  # five to a byte

    @property
    def limit(self) -> int:
        """Largest magnitude that the class holds."""
        return (32767, 127, 7, 1)[self]


@dataclass(frozen=True, eq=False)
class RdPlan:
    """How the coefficients of one side of one layer group become symbols at one rate.

    With ``u = scale * coefficient / step`` (scale: the token's importance, see
    `dynamo_kvtc.codec.importance`), a symbol is ``q = sign(u) * floor(|u| + rounding)``: a uniform
    quantiser with a dead zone (Sullivan 1996, "Efficient scalar quantization of exponential and Laplacian
    random variables"). It is decoded to ``sign(q) * (|q| + offset) * step / scale``, the offset being
    ``offsets[0]`` for magnitude 1 and ``offsets[1]`` beyond, and to 0 for 0.

    Attributes
    ----------
    step : float
        Width of a quantisation interval, the same for all sides and groups of an artifact at one rate.
    components : torch.Tensor
        int64 ``[stored]``: component of each row of symbols, in the payload's order: class by class, in
        a class by falling rate.
    counts : tuple[int, int, int, int]
        Components of each `SymbolClass`.
    rounding : torch.Tensor
        float32 ``[stored]``, above 0 and at most 0.5.
    offsets : torch.Tensor
        float32 ``[2, stored]``, above -1 and below 1.
    """

    step: float
    components: torch.Tensor
    counts: tuple[int, int, int, int]
    rounding: torch.Tensor
    offsets: torch.Tensor

    def __post_init__(self) -> None:
        stored = self.components.numel()
        if self.components.shape != (stored,) or self.components.dtype is not torch.int64:
            raise ArtifactFormatError("a plan's components must be a list of integers")
        if min(self.counts) < 0 or sum(self.counts) != stored:
            raise ArtifactFormatError(f"a plan's classes hold {self.counts} of {stored} components")
        if self.rounding.shape != (stored,) or self.offsets.shape != (2, stored):
            raise ArtifactFormatError("a plan needs one rounding and two offsets per component")
        if stored and (self.components.min() < 0 or len(set(self.components.tolist())) != stored):
            raise ArtifactFormatError("a plan names a component twice, or one below 0")
        if not (self.step > 0 and ((self.rounding > 0) & (self.rounding <= 0.5)).all()):
            raise ArtifactFormatError("a plan's step must be positive, its roundings above 0 and at most 0.5")
        if not (self.offsets.abs() < 1).all():
            raise ArtifactFormatError("a plan's reconstruction offsets must lie between -1 and 1")

    @property
    def rank(self) -> int:
        """Components of the basis that the plan reaches; everything beyond is trimmed."""
        return int(self.components.max()) + 1 if self.components.numel() else 0
