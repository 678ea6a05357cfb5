"""Locks on byte ranges that die with their owner, shared between processes of one machine.

They belong to an open file description (Linux ``F_OFD_SETLK``): the kernel drops them when its last
descriptor is closed, at the latest when the process ends, however it ends. Asking never waits.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path

from dynamo_kvtc.tiers.base import TierKey

__all__ = ["KeyClaims", "lock_range", "unlock_range"]

# struct flock: type, whence, start, length, process (0 for these locks).
_FLOCK = struct.Struct("@hhqqi4x")


def lock_range(fd: int, start: int, nbytes: int, *, exclusive: bool) -> bool:
    """Lock a range of a file if no other open file description holds it; returns whether it is ours now.

    False also if there can be no more locks.

    Raises
    ------
    OSError
        If the file system has no such locks.
    """
    try:
        _set(fd, fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK, start, nbytes)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES, errno.ENOLCK):
            return False
        raise
    return True


def unlock_range(fd: int, start: int, nbytes: int) -> None:
    """Give up what `lock_range` locked."""
    _set(fd, fcntl.F_UNLCK, start, nbytes)


def _set(fd: int, kind: int, start: int, nbytes: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, start, nbytes, 0))


class KeyClaims:
    """One writer per key: a claim is a lock on one byte of a common, empty file.

    Two keys share a byte with a chance of 2**-62; then one of them is not stored this time.

    Parameters
    ----------
    path : Path
        The common file; made if it is missing.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def claim(self, key: TierKey) -> bool:
        """Claim a key; False if another worker has it."""
        return lock_range(self._fd, self._place(key), 1, exclusive=True)

    def release(self, key: TierKey) -> None:
        """Give a claim up."""
        unlock_range(self._fd, self._place(key), 1)

    def close(self) -> None:
        """Give all claims up."""
        os.close(self._fd)

    @staticmethod
    def _place(key: TierKey) -> int:
        return int.from_bytes(key[:8], "little") >> 2
