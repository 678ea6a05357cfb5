"""Memory of a device that NIXL may read files into, past the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dynamo_kvtc.transfer.backend import DRAM, VRAM
from dynamo_kvtc.transfer.memory import MemoryRegion, MemorySpan

if TYPE_CHECKING:
    import torch

__all__ = ["DeviceRegion", "tensor_of"]


class DeviceRegion(MemoryRegion):
    """A tensor's memory, for `TransferAgent.register_memory`; the region keeps the tensor alive.

    Its spans have no `view`: their bytes are the device's. On a GPU only GPUDirect Storage moves them.
    A tensor on the CPU stands for a device's memory where kernels run in Triton's interpreter.

    Parameters
    ----------
    tensor : torch.Tensor
        uint8 ``[bytes]``, contiguous.

    Raises
    ------
    ValueError
        If it is of another kind.
    """

    __slots__ = ("tensor",)

    def __init__(self, tensor: torch.Tensor) -> None:
        if tensor.ndim != 1 or tensor.element_size() != 1 or not tensor.is_contiguous():
            raise ValueError("a region of device memory is one contiguous run of bytes")
        super().__init__(np.empty(0, dtype=np.uint8), None)
        self.tensor = tensor

    @property
    def address(self) -> int:
        """Address of the first byte on the device."""
        return int(self.tensor.data_ptr())

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.tensor.numel()

    @property
    def kind(self) -> str:
        """What NIXL takes the region for."""
        return VRAM if self.tensor.is_cuda else DRAM

    @property
    def device(self) -> int:
        """Number of the device."""
        return (self.tensor.device.index or 0) if self.tensor.is_cuda else 0

    @property
    def on_device(self) -> bool:
        """True."""
        return True

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Refuse.

        Raises
        ------
        TypeError
            Always.
        """
        raise TypeError("the bytes of a region on a device are not the host's to look at")


def tensor_of(span: MemorySpan) -> torch.Tensor:
    """Return a span of a `DeviceRegion` as uint8 ``[bytes]``; a `TypeError` if it is of another region."""
    region = span.region
    if not isinstance(region, DeviceRegion):
        raise TypeError("the span is not of a device's memory")
    return region.tensor[span.offset : span.offset + span.nbytes]
