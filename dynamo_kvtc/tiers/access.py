"""Whether a folder of stored KV is private to the user of this process."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path
from typing import Literal

from dynamo_kvtc.errors import TierError

__all__ = ["OpenFolders", "check_private"]

#: What to do about a folder that others may enter: start with a warning, refuse to start, or say nothing.
OpenFolders = Literal["warn", "refuse", "allow"]

_log = logging.getLogger(__name__)

_OTHERS = stat.S_IRWXG | stat.S_IRWXO

# Entries looked at; a tier's folder has a few hundred.
_MOST_ENTRIES = 10_000


def check_private(folder: Path, how: OpenFolders) -> None:
    """See that nobody but the owner has access to a folder and to the files in it. Blocking.

    A folder that does not exist yet is made private by its tier.

    Raises
    ------
    TierError
        With ``"refuse"``, if others have access.
    """
    if how == "allow":
        return
    problem = _open_to_others(folder)
    if problem is None:
        return
    message = (
        f"{problem}, and the folder holds stored KV: chmod -R go-rwx {folder}, give the tier a folder below "
        f"it, or set security.open_folders to allow"
    )
    if how == "refuse":
        raise TierError(message)
    _log.warning(message)


def _open_to_others(folder: Path) -> str | None:
    try:
        status = folder.stat()
        if status.st_mode & _OTHERS:
            return f"others than its owner have access to {folder} (mode {stat.S_IMODE(status.st_mode):04o})"
        with os.scandir(folder) as entries:
            for _, entry in zip(range(_MOST_ENTRIES), entries, strict=False):
                mode = entry.stat(follow_symlinks=False).st_mode
                if stat.S_ISREG(mode) and mode & _OTHERS:
                    return f"others have access to {entry.path} (mode {stat.S_IMODE(mode):04o})"
    except OSError:
        return None  # not there yet, or unusable, which its tier says better
    return None
