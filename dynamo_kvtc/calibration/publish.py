"""A store of artifacts: a folder with one artifact per id, and aliases that name ids.

A store holds any number of artifacts side by side. An artifact is in it whole or not at all, and never
changes, so workers of different releases may read it at the same time. An alias is a small text file
with an id, replaced in one step.

    STORE/<id>/artifact.json …      the artifact, under its content id
    STORE/aliases/<name>            the id that the name stands for
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dynamo_kvtc.calibration.artifact import MANIFEST_NAME, PARAMETERS_NAME, load_artifact
from dynamo_kvtc.errors import ArtifactError, ArtifactFormatError

__all__ = ["ALIASES", "publish", "resolve"]

ALIASES = "aliases"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_ID = re.compile(r"[0-9a-f]{64}")
_REPORTS = ("report.md", "report.json", "report.png")


def publish(folder: Path, store: Path, aliases: Sequence[str] = ()) -> Path:
    """Copy an artifact into a store under its id, and let aliases name it. Repeating it changes nothing.

    Parameters
    ----------
    folder : Path
        An artifact; it is verified first.
    store : Path
        Made if it is missing. The copy appears there by one rename, which needs a file system that has it
        (object stores that are mounted as folders often do not).
    aliases : Sequence[str]
        Names that stand for this artifact from now on: letters, digits, ``.``, ``_``, ``-``.

    Returns
    -------
    Path
        The artifact's folder in the store.

    Raises
    ------
    ArtifactError
        If the artifact, or what the store holds under its id, is damaged; if an alias is no such name; or if
        the store cannot be written.
    """
    for alias in aliases:
        _check_alias(alias)
    artifact_id = load_artifact(folder).manifest.id
    target = store / artifact_id
    try:
        store.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            _copy(folder, store, target)
        load_artifact(target)
        (store / ALIASES).mkdir(exist_ok=True)
        for alias in aliases:
            _write(store / ALIASES / alias, artifact_id + "\n")
    except OSError as error:
        raise ArtifactError(
            f"cannot publish into {store}: {error}; check its rights and its space"
        ) from error
    return target


def resolve(store: Path, name: str) -> Path:
    """Return the folder in a store of an artifact's id or alias.

    Raises
    ------
    ArtifactError
        If there is none, the name is none, or its alias is damaged.
    """
    if not _ID.fullmatch(name):
        _check_alias(name)
        try:
            text = (store / ALIASES / name).read_text(encoding="ascii").strip()
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{store} has no artifact {name!r}: publish one under this name") from error
        if not _ID.fullmatch(text):
            raise ArtifactFormatError(f"the alias {name!r} in {store} names no id; publish the artifact anew")
        name = text
    folder = store / name
    if not (folder / MANIFEST_NAME).is_file():
        raise ArtifactError(f"{store} has no artifact {name}: publish it")
    return folder


def _check_alias(alias: str) -> None:
    if not _NAME.fullmatch(alias) or _ID.fullmatch(alias):
        raise ArtifactError(
            f"{alias!r} is no alias: use up to 63 letters, digits, '.', '_' and '-', and no artifact's id"
        )


def _copy(folder: Path, store: Path, target: Path) -> None:
    scratch = Path(tempfile.mkdtemp(prefix=".publishing-", dir=store))
    try:
        names = (MANIFEST_NAME, PARAMETERS_NAME, *(name for name in _REPORTS if (folder / name).is_file()))
        for name in names:
            shutil.copyfile(folder / name, scratch / name)
            _sync(scratch / name)
        scratch.chmod(0o755)
        _sync(scratch)
        try:
            scratch.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was faster, and its copy is the same
                raise
        _sync(store)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write(path: Path, text: str) -> None:
    """Replace a file in one step."""
    descriptor, scratch = tempfile.mkstemp(prefix=".alias-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(scratch).chmod(0o644)
        Path(scratch).replace(path)
    except OSError:
        Path(scratch).unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
