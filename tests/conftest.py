"""What every test shares."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def package_logging() -> Iterator[None]:
    """Undo what a command did to the package's logger."""
    logger = logging.getLogger("dynamo_kvtc")
    handlers, level = logger.handlers[:], logger.level
    yield
    logger.handlers[:] = handlers
    logger.setLevel(level)
