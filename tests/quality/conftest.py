"""The tiny random model in float32, with an artifact of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_model import write_tiny_model

from dynamo_kvtc.calibration.artifact import Artifact
from dynamo_kvtc.calibration.models import LoadedModel, load_model
from dynamo_kvtc.calibration.run import calibrate
from dynamo_kvtc.calibration.settings import CalibrationSettings
from dynamo_kvtc.data import CALIBRATION_TEXTS


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Where cores are shared, two threads are slower than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def byte_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("byte-model")
    write_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def byte_model(byte_model_folder: Path) -> LoadedModel:
    return load_model(byte_model_folder, "float32")


@pytest.fixture(scope="session")
def byte_artifact(byte_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return calibrate(
        CalibrationSettings(
            model=str(byte_model_folder),
            texts=CALIBRATION_TEXTS,
            out=tmp_path_factory.mktemp("byte-artifact"),
            profile="kvtc",
            tokens=2000,
            ratios=(2.5, 4.0, 8.0),
            document_tokens=500,
            sample_tokens=512,
            dtype="float32",
        )
    )
