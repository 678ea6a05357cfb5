"""Kernels run on a GPU if there is one, and in Triton's interpreter otherwise (see `tests/conftest.py`)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "codec"))

from dynamo_kvtc.codec.gpu.device import GpuDevice


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Numpy, which the interpreter computes with, warns of NaN and infinity in lanes that are masked out."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning"))


@pytest.fixture(scope="session")
def gpu() -> GpuDevice:
    """The device that kernels run on."""
    return GpuDevice.open() if torch.cuda.is_available() else GpuDevice.interpreter(programs=3)
