"""KV with the statistics that calibration found, for measuring speed without a model."""

from __future__ import annotations

import torch

from dynamo_kvtc.calibration.artifact import Artifact
from dynamo_kvtc.codec.base import TierBlock
from dynamo_kvtc.codec.importance import predict_levels, scales
from dynamo_kvtc.codec.parameters import RdSideParameters

__all__ = ["synthetic_blocks"]


def synthetic_blocks(
    artifact: Artifact, num_blocks: int, block_tokens: int, *, sink_tokens: int = 4, seed: int = 0
) -> list[TierBlock]:
    """Draw consecutive tier blocks of one sequence.

    Coefficients are independent Gaussians of the calibrated variances (with rd, those that the importance
    of tokens has scaled). Real ones have heavier tails and run together along a text, so sizes differ
    somewhat from those of real KV; the work is the same.

    Parameters
    ----------
    artifact : Artifact
        Whose geometry, bases, means and variances are used.
    num_blocks, block_tokens : int
        How many tier blocks, and tokens in each.
    sink_tokens : int
        Sinks in the first one.
    """
    parameters = artifact.parameters
    geometry = parameters.geometry
    generator = torch.Generator().manual_seed(seed)
    tokens = num_blocks * block_tokens
    shape = (tokens, geometry.num_layers, geometry.num_kv_heads, geometry.head_size)
    keys, values = (
        torch.empty(shape, dtype=geometry.torch_dtype),
        torch.empty(shape, dtype=geometry.torch_dtype),
    )
    for index, group in enumerate(parameters.groups):
        layers = slice(group.layers.first, group.layers.stop)
        for name, side, target in (("keys", group.keys, keys), ("values", group.values, values)):
            deviations = artifact.variances[index, name].clamp(min=0).sqrt()
            drawn = torch.randn((tokens, deviations.numel()), generator=generator) * deviations
            centred = drawn @ side.synthesis(torch.arange(deviations.numel()))
            if isinstance(side, RdSideParameters):
                levels = predict_levels(centred, side.importance, side.importance_bias)
                centred /= scales(levels)[:, None]
            rows = (centred + side.mean).view(tokens, -1, *shape[2:])
            if name == "keys":
                rows = parameters.rope.apply_rope(rows, torch.arange(tokens))
            target[:, layers] = rows.to(geometry.torch_dtype)
    return [
        TierBlock(
            keys=keys[first : first + block_tokens],
            values=values[first : first + block_tokens],
            first_position=first,
            sink_tokens=sink_tokens if first == 0 else 0,
        )
        for first in range(0, tokens, block_tokens)
    ]
