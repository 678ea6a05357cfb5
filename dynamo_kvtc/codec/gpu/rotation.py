"""Cosines and sines on the device, one column per pair of channels.

As `RopeParameters.cos_sin`: angles in float64, then rounded to float32. Pairs that are not rotated get 1
and 0.
"""

from __future__ import annotations

import torch

from dynamo_kvtc.codec.gpu.device import GpuDevice
from dynamo_kvtc.codec.rope import RopeParameters

__all__ = ["rotation_tables"]


def rotation_tables(
    gpu: GpuDevice, rope: RopeParameters, positions: torch.Tensor, head_size: int, *, inverse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines, float32 ``[tokens, head_size / 2]``, of int64 positions ``[tokens]``."""
    angles = positions.to(torch.float64)[:, None] * gpu.upload(rope.inv_freq())[None, :]
    scale = rope.attention_scaling()
    cos, sin = (angles.cos() * scale).float(), (angles.sin() * scale).float()
    if inverse:
        cos, sin = rope.inverse(cos, sin)
    rest = head_size // 2 - cos.shape[1]
    pad = torch.nn.functional.pad
    return pad(cos, (0, rest), value=1.0).contiguous(), pad(sin, (0, rest)).contiguous()
