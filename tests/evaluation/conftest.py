"""A tiny random model on disk with an artifact of its own: fast, and every part of the way is real."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_model import write_tiny_model

from dynamo_kvtc.calibration.artifact import Artifact
from dynamo_kvtc.calibration.models import LoadedModel, load_model
from dynamo_kvtc.calibration.run import calibrate
from dynamo_kvtc.calibration.settings import CalibrationSettings
from dynamo_kvtc.data import CALIBRATION_TEXTS
from dynamo_kvtc.evaluation import EvaluationProtocol


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-model")
    write_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_folder: Path) -> LoadedModel:
    return load_model(tiny_folder)


@pytest.fixture(scope="session")
def tiny_artifact(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return calibrate(
        CalibrationSettings(
            model=str(tiny_folder),
            texts=CALIBRATION_TEXTS,
            out=tmp_path_factory.mktemp("tiny-artifact"),
            profile="kvtc",
            threads=1,
            tokens=2000,
            ratios=(2.5, 4.0),
            document_tokens=500,
            sample_tokens=512,
        )
    )


@pytest.fixture(scope="session")
def tiny_rd_artifact(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return calibrate(
        CalibrationSettings(
            model=str(tiny_folder),
            texts=CALIBRATION_TEXTS,
            out=tmp_path_factory.mktemp("tiny-rd-artifact"),
            threads=1,
            tokens=2500,
            ratios=(4.0, 8.0),
            document_tokens=500,
            sample_tokens=512,
            validation_documents=1,
            sensitivity_documents=2,
            recall_share=0.0,
            scored_tokens=64,
        )
    )


@pytest.fixture(scope="session", params=["kvtc", "rd"])
def any_artifact(
    request: pytest.FixtureRequest, tiny_artifact: Artifact, tiny_rd_artifact: Artifact
) -> Artifact:
    return tiny_artifact if request.param == "kvtc" else tiny_rd_artifact


@pytest.fixture(scope="session")
def short_protocol() -> EvaluationProtocol:
    """192 context tokens in streams of 64, 64 and 32 tokens, and 16 scored ones."""
    return EvaluationProtocol(
        documents=2, context_tokens=192, scored_tokens=16, recent_window=32, tier_block_tokens=64
    )
