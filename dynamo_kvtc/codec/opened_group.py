"""A layer group between entropy decoding and the products that turn it into KV."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from dynamo_kvtc.codec.rope import RopeParameters

__all__ = ["OpenedGroup", "join_groups"]


@dataclass(frozen=True, eq=False)
class OpenedGroup:
    """One layer group of one stream, inflated and dequantised; what `TransformCodec.decode_layer` takes.

    Joined ones hold several consecutive streams.

    Attributes
    ----------
    group : int
        Index of the layer group.
    plan_id : int
        Bit plan that the coefficients belong to.
    keys, values : torch.Tensor
        Coefficients ``[coded tokens, stored]`` in the compute dtype.
    sink_keys, sink_values : torch.Tensor
        ``[layers, sink tokens, num_kv_heads, head_size]`` in the cache's dtype.
    positions : torch.Tensor
        int64 ``[coded tokens]``.
    rope : RopeParameters
        How keys are rotated.
    """

    group: int
    plan_id: int
    keys: torch.Tensor
    values: torch.Tensor
    sink_keys: torch.Tensor
    sink_values: torch.Tensor
    positions: torch.Tensor
    rope: RopeParameters

    @property
    def sink_tokens(self) -> int:
        """Sink tokens at the start."""
        return int(self.sink_keys.shape[1])

    @property
    def num_tokens(self) -> int:
        """All tokens."""
        return self.sink_tokens + self.positions.numel()

    @cached_property
    def cos_sin(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotation of the coded tokens, the same for all layers; see `RopeParameters.cos_sin`."""
        return self.rope.cos_sin(self.positions)


def join_groups(parts: Sequence[OpenedGroup]) -> list[OpenedGroup]:
    """Join consecutive streams of one plan where only the first has sink tokens."""
    runs: list[list[OpenedGroup]] = []
    for part in parts:
        if runs and part.plan_id == runs[-1][0].plan_id and not part.sink_tokens:
            runs[-1].append(part)
        else:
            runs.append([part])
    return [_join_run(run) for run in runs]


def _join_run(run: Sequence[OpenedGroup]) -> OpenedGroup:
    """Join streams of one plan of which only the first has sink tokens."""
    if len(run) == 1:
        return run[0]
    return replace(
        run[0],
        keys=torch.cat([part.keys for part in run]),
        values=torch.cat([part.values for part in run]),
        positions=torch.cat([part.positions for part in run]),
    )
