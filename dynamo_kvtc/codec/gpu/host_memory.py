"""Host memory as tensors, and pinned, so that copies to and from the device are asynchronous."""

from __future__ import annotations

import torch

from dynamo_kvtc.codec.entropy import Buffer
from dynamo_kvtc.errors import GpuUnavailableError

__all__ = ["as_tensor", "pin", "unpin"]


def as_tensor(buffer: Buffer) -> torch.Tensor:
    """Return a uint8 tensor over writable memory; read-only memory is copied, as torch wants it writable."""
    view = memoryview(buffer).cast("B")
    if not len(view):
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(view) if view.readonly else view, dtype=torch.uint8)


def pin(address: int, nbytes: int) -> None:
    """Pin host memory that NIXL has registered: page-locked, and known to CUDA.

    Raises
    ------
    GpuUnavailableError
        If CUDA refuses; most often the limit of locked memory (``ulimit -l``).
    """
    code = int(torch.cuda.cudart().cudaHostRegister(address, nbytes, 0))  # type: ignore[no-untyped-call]
    if code:
        raise GpuUnavailableError(
            f"CUDA cannot pin {nbytes} bytes of staging memory (cudaError {code}): raise `ulimit -l`, or "
            "make transfer.staging smaller"
        )


def unpin(address: int) -> None:
    """Undo `pin`, before the memory is freed."""
    torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]
