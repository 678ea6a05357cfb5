"""Host memory as tensors."""

from __future__ import annotations

import torch

from dynamo_kvtc.codec.entropy import Buffer

__all__ = ["as_tensor"]


def as_tensor(buffer: Buffer) -> torch.Tensor:
    """Return uint8 ``[bytes]`` over writable memory; read-only memory is copied: torch wants it writable."""
    view = memoryview(buffer).cast("B")
    if not len(view):
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(view) if view.readonly else view, dtype=torch.uint8)
