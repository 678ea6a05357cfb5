"""An opened part on its way into the paged cache: slots, rotation tables, launches of runs of layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from dynamo_kvtc.codec.geometry import LayerRange
from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.gpu.kernels.reconstruct import layer_tiles, reconstruct_layers
from dynamo_kvtc.codec.gpu.opened import DeviceGroup
from dynamo_kvtc.codec.gpu.paged import PagedSide
from dynamo_kvtc.codec.gpu.rotation import rotation_tables
from dynamo_kvtc.codec.gpu.weights import DeviceWeights
from dynamo_kvtc.codec.header import SectionKind
from dynamo_kvtc.codec.rope import RopeParameters

__all__ = ["ScatterWork", "run_positions", "token_slots"]


def token_slots(block_ids: Sequence[int], block_size: int) -> torch.Tensor:
    """Return each token's place, ``block * block_size + token in the block``, -1 for a block of -1.

    int64 ``[len(block_ids) * block_size]`` on the CPU.
    """
    blocks = torch.as_tensor(block_ids, dtype=torch.int64)
    slots = blocks[:, None] * block_size + torch.arange(block_size)
    return torch.where(blocks[:, None] >= 0, slots, -1).flatten()


def run_positions(first: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
    """Return runs of consecutive positions: int64 ``[sum of counts]`` on the CPU."""
    return torch.cat([torch.arange(start, start + count) for start, count in zip(first, counts, strict=True)])


class ScatterWork:
    """One opened part and where its tokens go.

    Parameters
    ----------
    layers : LayerRange
        The layer group.
    weights : Callable
        Returns the transform of one side.
    slots : torch.Tensor
        int64 ``[tokens]`` on the CPU: `token_slots` of the part's tokens.
    """

    def __init__(
        self,
        gpu: GpuDevice,
        rope: RopeParameters,
        layers: LayerRange,
        weights: Callable[[SectionKind], DeviceWeights],
        part: DeviceGroup,
        slots: torch.Tensor,
    ) -> None:
        self._gpu, self._layers, self._weights, self._part = gpu, layers, weights, part
        coded, first, start = [], [], 0
        self._sinks = []
        for segment in part.segments:
            middle, stop = start + segment.sink_tokens, start + segment.num_tokens
            own = slots[start:middle]
            if (own >= 0).any():
                self._sinks.append((segment, gpu.upload(own[own >= 0]), gpu.upload(own >= 0)))
            coded.append(slots[middle:stop])
            first.append(segment.first_position + segment.sink_tokens)
            start = stop
        counts = [segment.coded for segment in part.segments]
        head_size = int(part.segments[0].sink_keys.shape[-1])
        positions = gpu.upload(run_positions(first, counts))
        self._rotation = rotation_tables(gpu, rope, positions, head_size, inverse=False)
        self._slots = gpu.upload(torch.cat(coded))

    def tiles(self, side: PagedSide) -> int:
        """Return the tiles of one launch of one layer."""
        return layer_tiles(self._gpu, self._slots.numel(), side)

    def launch(
        self,
        layers: LayerRange,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        key_side: PagedSide,
        value_side: PagedSide,
    ) -> None:
        """Launch layers of the group, into the cache's views of all layers; on the device's stream."""
        part = self._part
        own = slice(layers.first - self._layers.first, layers.stop - self._layers.first)
        for kind, cache, coefficients, rotation in (
            (SectionKind.KEYS, key_side, part.keys, self._rotation),
            (SectionKind.VALUES, value_side, part.values, None),
        ):
            weights = self._weights(kind)
            reconstruct_layers(
                self._gpu, coefficients, weights.inverse[own], weights.mean[own], rotation, self._slots,
                cache.layers(layers.first, layers.stop),
            )  # fmt: skip
        block_size = key_side.block_size
        for segment, slots, wanted in self._sinks:
            place = slots // block_size, slots % block_size
            for layer in range(layers.first, layers.stop):
                keys[layer][place] = segment.sink_keys[layer - self._layers.first][wanted]
                values[layer][place] = segment.sink_values[layer - self._layers.first][wanted]
