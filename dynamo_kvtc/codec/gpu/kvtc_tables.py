"""A bit plan of the kvtc profile as kernels read it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.plan import BitPlan
from dynamo_kvtc.codec.quantiser import STORED_TYPES

__all__ = ["UNIT_ROWS", "KvtcTables", "TypeTable"]

#: Rows that the quantiser takes at once: of one group, or as many groups of one component.
UNIT_ROWS = 16

#: Rows of a panel, unless a single group has more: two tiles of a product, so that few rows of them stay
#: empty.
_PANEL_ROWS = 256


@dataclass(frozen=True, eq=False)
class TypeTable:
    """The groups of one type.

    Attributes
    ----------
    bits : int
        8, 4 or 2.
    first_row, rows : int
        Its rows among all rows of coefficients.
    members : torch.Tensor
        int32 ``[rows]`` on the device: group of the plan of each row.
    """

    bits: int
    first_row: int
    rows: int
    members: torch.Tensor


@dataclass(frozen=True, eq=False)
class KvtcTables:
    """All groups of a plan, rows in the order of `PlanQuantiser.components`.

    Attributes
    ----------
    num_groups : int
        Groups of the plan.
    counts : tuple[int, ...]
        Components of each of `STORED_TYPES`.
    types : tuple[TypeTable, ...]
        The types that occur.
    units : torch.Tensor
        int32 ``[units, 4]`` on the device, what is quantised at once: group of the plan, first row, rows, and
        whether each row is a group of its own; those are consecutive groups of the plan.
    panels : torch.Tensor
        int32 ``[panels, 5]`` on the device, units of one type that a program projects and quantises: bits,
        first unit, one past the last, first row, one past the last. The largest first.
    panel_rows : int
        Rows of the largest panel.
    """

    num_groups: int
    counts: tuple[int, ...]
    types: tuple[TypeTable, ...]
    units: torch.Tensor
    panels: torch.Tensor
    panel_rows: int

    @classmethod
    def make(cls, gpu: GpuDevice, plan: BitPlan) -> KvtcTables:
        """Put the plan on the device."""
        start, counts, types = 0, [], []
        units: list[_Unit] = []
        panels: list[tuple[int, int, int, int, int]] = []
        for quant_type in STORED_TYPES:
            first, first_unit, members = start, len(units), []
            for index, group in enumerate(plan.groups):
                if group.type is quant_type:
                    _add(units, first_unit, _Unit(index, start, group.size, group.size == 1))
                    members += [index] * group.size
                    start += group.size
            counts.append(start - first)
            if members:
                own = gpu.upload(torch.tensor(members, dtype=torch.int32))
                types.append(TypeTable(quant_type.bits, first, start - first, own))
                panels += _panels(quant_type.bits, units, first_unit)
        panels.sort(key=lambda panel: panel[3] - panel[4])
        return cls(
            len(plan.groups),
            tuple(counts),
            tuple(types),
            gpu.upload(torch.tensor(units, dtype=torch.int32).reshape(-1, 4)),
            gpu.upload(torch.tensor(panels, dtype=torch.int32).reshape(-1, 5)),
            max((stop - first for *_, first, stop in panels), default=0),
        )

    @property
    def stored(self) -> int:
        """Rows of coefficients."""
        return sum(self.counts)


class _Unit(NamedTuple):
    group: int
    first_row: int
    rows: int
    singles: bool

    @property
    def stop(self) -> int:
        return self.first_row + self.rows


def _add(units: list[_Unit], first_unit: int, unit: _Unit) -> None:
    """Append a unit of the type that begins at `first_unit`, or make the last one of single rows longer."""
    last = units[-1] if len(units) > first_unit else None
    if (
        last
        and unit.singles
        and last.singles
        and last.rows < UNIT_ROWS
        and last.group + last.rows == unit.group
    ):
        units[-1] = last._replace(rows=last.rows + 1)
    else:
        units.append(unit)


def _panels(bits: int, units: Sequence[_Unit], first_unit: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Cut the units from `first_unit` on into panels."""
    begin = first_unit
    for stop in range(first_unit + 1, len(units) + 1):
        first_row = units[begin].first_row
        if stop == len(units) or units[stop].stop - first_row > _PANEL_ROWS:
            yield bits, begin, stop, first_row, units[stop - 1].stop
            begin = stop
