"""Key files of a configuration that others have access to, for `validate-config` and `doctor`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dynamo_kvtc.config import Config
from dynamo_kvtc.tiers.access import key_file_exposure
from dynamo_kvtc.tiers.encryption_keys import KEY_FILE_ADVICE

__all__ = ["ExposedKeyFile", "exposed_key_files", "key_files"]


@dataclass(frozen=True, slots=True)
class ExposedKeyFile:
    """A key file, what is wrong with its mode, and whether a worker refuses to start with it."""

    path: Path
    problem: str
    refused: bool

    @property
    def advice(self) -> str:
        """What to do about it."""
        return KEY_FILE_ADVICE.format(path=self.path)

    def __str__(self) -> str:
        consequence = "; a worker refuses to start with it" if self.refused else ""
        return f"{self.path}: {self.problem}{consequence}: {self.advice}"


def key_files(config: Config) -> dict[Path, str]:
    """Return the key files that a configuration names, with their keys' names."""
    return {
        key.file: key.id
        for tier in config.tiers
        if tier.encryption is not None
        for key in tier.encryption.keys
    }


def exposed_key_files(config: Config) -> Iterator[ExposedKeyFile]:
    """Yield those that are on this machine and open to others."""
    for path in key_files(config):
        try:
            exposure = key_file_exposure(path.stat().st_mode)
        except OSError:
            continue  # on another machine, perhaps
        if exposure is not None:
            yield ExposedKeyFile(path, *exposure)
