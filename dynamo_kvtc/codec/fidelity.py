"""How far a decoded tier block is from what was encoded, in the measure that artifacts state."""

from __future__ import annotations

import torch

from dynamo_kvtc.codec.base import TierBlock
from dynamo_kvtc.codec.parameters import AnyParameters

__all__ = ["relative_error"]


def relative_error(parameters: AnyParameters, block: TierBlock, decoded: TierBlock) -> float:
    """Return the squared error over the squared centred values, averaged over layers, keys and values.

    The measure of ``expected_error`` in an artifact: keys are taken before RoPE, the mean is the artifact's.
    Sink tokens are stored apart and left out. Computed where the block lies.

    Returns
    -------
    float
        0 for a block that holds nothing but sinks.
    """
    sinks = block.sink_tokens
    if sinks == block.num_tokens:
        return 0.0
    rope, device = parameters.rope, block.keys.device
    positions = torch.arange(block.first_position + sinks, block.first_position + block.num_tokens)
    cos, sin = rope.inverse(*rope.cos_sin(positions))
    unrotate = cos.to(device), sin.to(device)
    errors = []
    for group in parameters.groups:
        span = slice(group.layers.first, group.layers.stop)
        pairs = (
            (group.keys, rope.rotate(block.keys[sinks:, span], *unrotate), decoded.keys, True),
            (group.values, block.values[sinks:, span].float(), decoded.values, False),
        )
        for side, true, other, rotated in pairs:
            got = other.to(device)[sinks:, span]
            found = rope.rotate(got, *unrotate) if rotated else got.float()
            centred = true - side.mean.to(device).view(true.shape[1:])
            missed = (found - true).square().sum((0, 2, 3))
            errors.append(missed / centred.square().sum((0, 2, 3)).clamp_min(1e-30))
    return float(torch.cat(errors).mean())
