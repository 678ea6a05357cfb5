"""What every test shares."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch

if not torch.cuda.is_available():
    # Kernels run in Triton's interpreter, which is chosen when Triton is first imported, by whatever test.
    os.environ["TRITON_INTERPRET"] = "1"


with suppress(ImportError):  # not in the environment of the engines' tests
    from hypothesis import settings

    # A case that takes long on a busy machine is not wrong.
    settings.register_profile("no deadline", deadline=None)
    settings.load_profile("no deadline")


@pytest.fixture(autouse=True)
def package_logging() -> Iterator[None]:
    """Undo what a command did to the package's logger."""
    logger = logging.getLogger("dynamo_kvtc")
    handlers, level = logger.handlers[:], logger.level
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)
