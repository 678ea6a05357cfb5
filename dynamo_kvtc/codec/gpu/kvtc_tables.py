"""A bit plan of the kvtc profile as kernels read it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.plan import BitPlan
from dynamo_kvtc.codec.quantiser import STORED_TYPES

__all__ = ["KvtcTables", "TypeTable"]


@dataclass(frozen=True, eq=False)
class TypeTable:
    """The groups of one type.

    Attributes
    ----------
    bits : int
        8, 4 or 2.
    first_row, rows : int
        Its rows among all rows of coefficients.
    groups : torch.Tensor
        int32 ``[groups, 3]`` on the device: group of the plan, first row, rows.
    members : torch.Tensor
        int32 ``[rows]`` on the device: group of the plan of each row.
    """

    bits: int
    first_row: int
    rows: int
    groups: torch.Tensor
    members: torch.Tensor


@dataclass(frozen=True, eq=False)
class KvtcTables:
    """All groups of a plan.

    Attributes
    ----------
    num_groups : int
        Groups of the plan.
    counts : tuple[int, ...]
        Components of each of `STORED_TYPES`.
    types : tuple[TypeTable, ...]
        The types that occur.
    """

    num_groups: int
    counts: tuple[int, ...]
    types: tuple[TypeTable, ...]

    @classmethod
    def make(cls, gpu: GpuDevice, plan: BitPlan) -> KvtcTables:
        """Put the plan on the device; rows in the order of `PlanQuantiser.components`."""
        start, counts, types = 0, [], []
        for quant_type in STORED_TYPES:
            first, groups, members = start, [], []
            for index, group in enumerate(plan.groups):
                if group.type is quant_type:
                    groups.append((index, start, group.size))
                    members += [index] * group.size
                    start += group.size
            counts.append(start - first)
            if groups:
                types.append(
                    TypeTable(
                        quant_type.bits,
                        first,
                        start - first,
                        gpu.upload(torch.tensor(groups, dtype=torch.int32)),
                        gpu.upload(torch.tensor(members, dtype=torch.int32)),
                    )
                )
        return cls(len(plan.groups), tuple(counts), tuple(types))

    @property
    def stored(self) -> int:
        """Rows of coefficients."""
        return sum(self.counts)
