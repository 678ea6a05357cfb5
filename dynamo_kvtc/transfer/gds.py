"""NVIDIA's GPUDirect Storage (cuFile) through NIXL's plugin: whether it can be used, and files opened for it.

Only on request: loading the plugin where its kernel driver is missing hangs for ever, so what can be known
without loading it is looked at first. **Not run yet**: no machine with the driver was at hand.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

__all__ = ["GDS", "gds_options", "gds_problem", "open_direct"]

GDS = "GDS"

#: Requests of a batch, cuFile's own limit.
_BATCH = 128

_DRIVER = Path("/proc/driver/nvidia-fs/version")


def gds_problem() -> str | None:
    """Say why GPUDirect Storage cannot be used here; None if nothing speaks against it. Loads no plugin."""
    if not _DRIVER.exists():
        return f"the kernel driver nvidia-fs is not loaded ({_DRIVER} is missing)"
    try:
        ctypes.CDLL("libcufile.so.0")
    except OSError as error:
        return f"cuFile cannot be loaded ({error}): install the CUDA toolkit's libcufile"
    return None


def gds_options(max_descriptors: int, max_transfers: int) -> dict[str, str]:
    """Return the plugin's parameters: its pool of batches must not run out, for it then fails a transfer."""
    return {"batch_pool_size": str(-(-max_descriptors // _BATCH) + max_transfers), "batch_limit": str(_BATCH)}


def open_direct(fd: int) -> int:
    """Open a file again past the page cache, as cuFile wants it; the given descriptor stays open.

    Raises
    ------
    OSError
        If the file system cannot.
    """
    return os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
