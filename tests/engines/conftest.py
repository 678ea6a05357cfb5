"""What the engines' tests share: an artifact of the model that they serve."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[2] / "demo-output"


@pytest.fixture(scope="session")
def artifact() -> Path:
    """Return an artifact of SmolLM2-135M with a cache in bfloat16.

    Named by DYNAMO_KVTC_TEST_ARTIFACT, or the one of `make demo-short`, which is made now if it is not there.
    """
    if named := os.environ.get("DYNAMO_KVTC_TEST_ARTIFACT"):
        return Path(named)
    from dynamo_kvtc.calibration.run import calibrate
    from dynamo_kvtc.cli.demo import calibration_settings

    return calibrate(calibration_settings(DEMO, "rd", short=True)).folder
