"""Bit plans: which components are stored, in which groups, with which type.

Owns the plan's representation and its derived sizes. How a plan is found (dynamic programming over
measured errors) belongs to `dynamo_kvtc.calibration`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

from dynamo_kvtc.errors import ArtifactFormatError

__all__ = ["GROUP_SIZES", "SIDE_BITS", "BitPlan", "PlanGroup", "QuantType"]

#: Sizes a group of successive components may have (KVTC, section 3.2).
GROUP_SIZES: tuple[int, ...] = (1, 16, 64, 256, 1024)

#: Bits of side data that each stored group of each token carries: a 16-bit shift, a 16-bit scale.
SIDE_BITS = 32


class QuantType(IntEnum):
    """How the coefficients of a group are stored; the number is the id in streams and artifacts."""

    NONE = 0
    INT2 = 1
    INT4 = 2
    FP8 = 3

    @property
    def bits(self) -> int:
        """Bits per coefficient."""
        return (0, 2, 4, 8)[self]


@dataclass(frozen=True, slots=True)
class PlanGroup:
    """Components ``start .. start + size - 1``, quantised together with one shift and one scale."""

    start: int
    size: int
    type: QuantType

    @property
    def stop(self) -> int:
        """One past the last component."""
        return self.start + self.size

    @property
    def bits(self) -> int:
        """Nominal bits per token, side data counted, before entropy coding."""
        return 0 if self.type is QuantType.NONE else self.size * self.type.bits + SIDE_BITS


@dataclass(frozen=True)
class BitPlan:
    """The allocation of one side (keys or values) of one layer group at one nominal ratio.

    Attributes
    ----------
    groups : tuple[PlanGroup, ...]
        Stored groups by ascending start, without overlap; components in no group have 0 bits.
    """

    groups: tuple[PlanGroup, ...]

    def __post_init__(self) -> None:
        position = 0
        for group in self.groups:
            if group.size not in GROUP_SIZES or group.type is QuantType.NONE or group.start < position:
                raise ArtifactFormatError(
                    "bit plan is not a sequence of disjoint, ascending groups of sizes "
                    f"{GROUP_SIZES}: {group}"
                )
            position = group.stop

    @cached_property
    def rank(self) -> int:
        """Components of the basis that the plan reaches; everything beyond is trimmed."""
        return self.groups[-1].stop if self.groups else 0

    @cached_property
    def bits_per_token(self) -> int:
        """Nominal bits per token, side data counted, before entropy coding."""
        return sum(group.bits for group in self.groups)
