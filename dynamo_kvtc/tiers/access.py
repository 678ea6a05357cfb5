"""Whether stored KV, and the keys it is sealed with, are private to the user of this process."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path
from typing import Literal

from dynamo_kvtc.errors import TierError

__all__ = ["OpenFolders", "check_private", "key_file_exposure"]

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


def key_file_exposure(mode: int) -> tuple[str, bool] | None:
    """Say what is wrong with a key file of this mode, and whether that is a reason to refuse it.

    Who may write it decides what future objects are sealed with, so that is refused. Who may read it can
    open what is stored; that is no reason to refuse, since the files of a Kubernetes Secret are readable by
    everybody in their container unless `defaultMode` says otherwise.
    """
    shown = f"mode {stat.S_IMODE(mode):04o}"
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others than its owner may write it ({shown})", True
    if mode & stat.S_IROTH:
        return f"anybody on this machine may read it ({shown})", False
    return None


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
