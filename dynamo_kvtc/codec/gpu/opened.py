"""A layer group on the device between entropy decoding and the products that turn it into KV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["DeviceGroup", "Segment", "join_groups"]


@dataclass(frozen=True, eq=False)
class Segment:
    """The tokens of one stream: sink tokens, then coded ones.

    Attributes
    ----------
    first_position, coded : int
        Position of the first token, and number of coded tokens.
    sink_keys, sink_values : torch.Tensor
        ``[layers, sink tokens, num_kv_heads, head_size]`` on the device, in the cache's dtype.
    """

    first_position: int
    coded: int
    sink_keys: torch.Tensor
    sink_values: torch.Tensor

    @property
    def sink_tokens(self) -> int:
        """Sink tokens at the start."""
        return int(self.sink_keys.shape[1])

    @property
    def num_tokens(self) -> int:
        """All tokens."""
        return self.sink_tokens + self.coded


@dataclass(frozen=True, eq=False)
class DeviceGroup:
    """One layer group of consecutive streams of one plan.

    Attributes
    ----------
    group, plan_id : int
        Which layer group, and the plan that the coefficients follow.
    keys, values : torch.Tensor
        Coefficients bfloat16 ``[coded tokens, padded]`` on the device, as `GpuSide.decode` leaves them.
    segments : tuple[Segment, ...]
        The streams.
    batch : object
        Holds the staging memory; groups of one batch lie in the same tensors.
    first_row : int
        Where the coefficients begin in the batch's tensors.
    """

    group: int
    plan_id: int
    keys: torch.Tensor
    values: torch.Tensor
    segments: tuple[Segment, ...]
    batch: object
    first_row: int

    @property
    def num_tokens(self) -> int:
        """All tokens."""
        return sum(segment.num_tokens for segment in self.segments)


def join_groups(parts: Sequence[DeviceGroup]) -> list[DeviceGroup]:
    """Join neighbours of one batch and plan without copying; larger products are faster."""
    joined: list[DeviceGroup] = []
    for part in parts:
        last = joined[-1] if joined else None
        if (
            last is None
            or last.batch is not part.batch
            or last.plan_id != part.plan_id
            or last.first_row + last.keys.shape[0] != part.first_row
        ):
            joined.append(part)
            continue
        joined[-1] = DeviceGroup(
            part.group,
            part.plan_id,
            _extended(last.keys, part.keys),
            _extended(last.values, part.values),
            last.segments + part.segments,
            part.batch,
            last.first_row,
        )
    return joined


def _extended(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return one view over two that lie one behind the other."""
    return first.as_strided(
        (first.shape[0] + second.shape[0], first.shape[1]), first.stride(), first.storage_offset()
    )
