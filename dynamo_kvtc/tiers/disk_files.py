"""File system calls of the disk tier that Python does not offer: allocation, holes, the folder lock.

All of them block; call them in a thread.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import tempfile
from pathlib import Path

from dynamo_kvtc.errors import TierError, TierInUseError
from dynamo_kvtc.tiers.disk_format import BLOCK_BYTES

__all__ = ["LOCK_NAME", "allocate_range", "lock_folder", "make_folder", "punch_hole", "sync_folder"]

#: Name of the lock file in a tier's folder.
LOCK_NAME = "lock"

# <linux/falloc.h>
_KEEP_SIZE = 0x01
_PUNCH_HOLE = 0x02

_libc = ctypes.CDLL(None, use_errno=True)


def allocate_range(fd: int, offset: int, nbytes: int) -> None:
    """Reserve disk space for a range, so that writing into it cannot run out of it.

    Raises
    ------
    OSError
        ``ENOSPC`` or ``EDQUOT`` if there is no room.
    """
    try:
        _fallocate(fd, 0, offset, nbytes)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        os.posix_fallocate(fd, offset, nbytes)


def punch_hole(fd: int, offset: int, nbytes: int) -> None:
    """Give the disk space of a range back; it reads as zeros from then on."""
    if nbytes > 0:
        _fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, nbytes)


def _fallocate(fd: int, mode: int, offset: int, nbytes: int) -> None:
    result = _libc.fallocate(
        ctypes.c_int(fd), ctypes.c_int(mode), ctypes.c_int64(offset), ctypes.c_int64(nbytes)
    )
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def make_folder(folder: Path) -> None:
    """Make a folder and its parents if they are missing, so that they survive a power failure. Blocking."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a folder's entries survive a power failure. Blocking."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def lock_folder(folder: Path) -> int:
    """Make a tier's folder if needed, see that it is fit for one, and lock it for this process.

    Returns
    -------
    int
        File descriptor that holds the lock; the lock goes with it, at the latest when the process ends.

    Raises
    ------
    TierInUseError
        If another tier holds it.
    TierError
        If the folder cannot be made or written, or lies on a file system without holes.
    """
    try:
        make_folder(folder)
        fd = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise TierError(
            f"cannot use {folder} for a disk tier: {error.strerror}; check path and rights"
        ) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _try_holes(folder)
    except BlockingIOError as error:
        os.close(fd)
        raise TierInUseError(
            f"{folder} is in use by another disk tier; give each one a folder of its own, or share it with "
            f"`shared: true` in the configuration of all of them"
        ) from error
    except OSError as error:
        os.close(fd)
        raise TierError(
            f"{folder} cannot hold a disk tier: {error.strerror}; it needs a writable file system with "
            f"hole punching (ext4, xfs, btrfs, tmpfs, NFS 4.2), so that evicted bytes are given back"
        ) from error
    return fd


def _try_holes(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(2 * BLOCK_BYTES))
        file.flush()
        punch_hole(file.fileno(), 0, BLOCK_BYTES)
