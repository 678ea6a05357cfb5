"""Registered files: what NIXL may read and write on disk, and spans within them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dynamo_kvtc.transfer.backend import FILE, POSIX
from dynamo_kvtc.transfer.gds import GDS

__all__ = ["FileRegion", "FileSpan"]


@dataclass(eq=False, slots=True)
class FileRegion:
    """An open file registered with one `TransferAgent`; made by its `open_file` or `register_file`.

    Attributes
    ----------
    fd : int
        The open file descriptor.
    nbytes : int
        Registered size in bytes: no span reaches beyond it. The file itself may be shorter; reads
        beyond its real end fail.
    name : str
        For messages.
    owns_fd : bool
        Whether `TransferAgent.close_file` closes `fd`.
    registration : Any
        NIXL's handle, owned by the agent.
    direct : bool
        Whether GPUDirect Storage moves its bytes.
    """

    fd: int
    nbytes: int
    name: str
    owns_fd: bool
    registration: Any
    direct: bool = False

    @property
    def kind(self) -> str:
        """What NIXL takes the region for."""
        return FILE

    @property
    def backend(self) -> str:
        """The NIXL backend that moves its bytes."""
        return GDS if self.direct else POSIX

    @property
    def registered_name(self) -> str:
        """What NIXL is told about the region besides its descriptor."""
        return ""

    def span(self, offset: int, nbytes: int) -> FileSpan:
        """Return the span ``[offset, offset + nbytes)``; a `ValueError` if it is not within the region."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
            raise ValueError(
                f"span [{offset}, {offset + nbytes}) is outside {self.name} of {self.nbytes} bytes"
            )
        return FileSpan(self, offset, nbytes)


@dataclass(frozen=True, slots=True)
class FileSpan:
    """A run of bytes inside a registered file."""

    region: FileRegion
    offset: int
    nbytes: int
