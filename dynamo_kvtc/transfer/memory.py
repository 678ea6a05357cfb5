"""Registered memory: regions that NIXL may read and write, and spans within them."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dynamo_kvtc.errors import TransferError
from dynamo_kvtc.transfer.backend import DRAM

__all__ = ["MemoryRegion", "MemorySpan"]


@dataclass(eq=False, slots=True)
class MemoryRegion:
    """Host memory registered with one `TransferAgent`; made by `TransferAgent.allocate` only.

    Memory of a device is a `dynamo_kvtc.transfer.device_memory.DeviceRegion`.

    Attributes
    ----------
    array : numpy.ndarray
        uint8 ``[nbytes]``, page-aligned; the region keeps it alive.
    registration : Any
        NIXL's handle, owned by the agent.
    pinned : bool
        Whether CUDA knows the memory, too.
    """

    array: NDArray[np.uint8]
    registration: Any
    pinned: bool = False

    @classmethod
    def allocate(cls, nbytes: int) -> MemoryRegion:
        """Return page-aligned, zeroed memory that is not registered yet.

        Raises
        ------
        TransferError
            If it cannot be had.
        ValueError
            If `nbytes` is below 1.
        """
        if nbytes < 1:
            raise ValueError(f"a region needs at least one byte, not {nbytes}")
        try:
            memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise TransferError(f"cannot allocate {nbytes} bytes of host memory: {error}") from error
        return cls(np.frombuffer(memory, dtype=np.uint8), None)

    @property
    def address(self) -> int:
        """Address of the first byte."""
        return int(self.array.ctypes.data)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.array.nbytes

    @property
    def kind(self) -> str:
        """What NIXL takes the region for."""
        return DRAM

    @property
    def device(self) -> int:
        """Number of the device that the memory is of; 0 for the host."""
        return 0

    @property
    def on_device(self) -> bool:
        """Whether the bytes are a device's, so that spans have no `view`."""
        return False

    def view(self, offset: int, nbytes: int) -> memoryview:
        """Return bytes of the region, writable."""
        return self.array.data[offset : offset + nbytes]

    def span(self, offset: int = 0, nbytes: int | None = None) -> MemorySpan:
        """Return the span ``[offset, offset + nbytes)``, to the end by default.

        Raises
        ------
        ValueError
            If it is not within the region.
        """
        length = self.nbytes - offset if nbytes is None else nbytes
        if offset < 0 or length < 0 or offset + length > self.nbytes:
            raise ValueError(f"span [{offset}, {offset + length}) is outside a region of {self.nbytes} bytes")
        return MemorySpan(self, offset, length)


@dataclass(frozen=True, slots=True)
class MemorySpan:
    """A run of bytes inside a registered region."""

    region: MemoryRegion
    offset: int
    nbytes: int

    @property
    def address(self) -> int:
        """Address of the span's first byte."""
        return self.region.address + self.offset

    @property
    def view(self) -> memoryview:
        """The bytes themselves, writable; a `TypeError` where they are a device's."""
        return self.region.view(self.offset, self.nbytes)

    def slice(self, offset: int, nbytes: int) -> MemorySpan:
        """Return a span within this one; a `ValueError` if it is not."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
            raise ValueError(f"slice [{offset}, {offset + nbytes}) is outside a span of {self.nbytes} bytes")
        return MemorySpan(self.region, self.offset + offset, nbytes)
