"""Host memory that CUDA knows: page-locked, so that copies between it and a device are asynchronous."""

from __future__ import annotations

import logging
from typing import Any

__all__ = ["pin", "unpin"]

_log = logging.getLogger(__name__)


def _cudart() -> Any:
    import torch

    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def pin(address: int, nbytes: int) -> bool:
    """Pin host memory; call it only where a CUDA device is in use. Takes all its pages.

    Returns
    -------
    bool
        False if CUDA refuses, most often for the limit of locked memory: everything works then, slower.
    """
    code = int(_cudart().cudaHostRegister(address, nbytes, 0))
    if code:
        _log.warning(
            "CUDA cannot pin %d bytes of host memory (cudaError %d), which makes copies slower: raise "
            "`ulimit -l`, or lower transfer.staging (or load_buffer)",
            nbytes,
            code,
        )
    return not code


def unpin(address: int) -> None:
    """Undo `pin`, before the memory is freed."""
    _cudart().cudaHostUnregister(address)
