"""Logs of one line each: time, level, logger, message, then ``key=value`` fields.

Modules log with ``logging.getLogger(__name__)`` and give fields in ``extra={"kvtc": {...}}``.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

__all__ = ["LOG_LEVELS", "LineFormatter", "configure_logging"]

#: Names of levels that a user may choose.
LOG_LEVELS: tuple[str, ...] = ("debug", "info", "warning", "error")

_ROOT = "dynamo_kvtc"


def _value(value: Any) -> str:
    """Write a field's value so that a line splits at spaces: bare words as they are, the rest as JSON."""
    text = value if isinstance(value, str) else str(value)
    bare = text and all(character.isalnum() or character in "._-:/+%" for character in text)
    return text if bare else json.dumps(text, ensure_ascii=False)


class LineFormatter(logging.Formatter):
    """Formats a record as one line; line breaks in messages and tracebacks are escaped."""

    def format(self, record: logging.LogRecord) -> str:
        """Return ``2026-01-31T12:00:00.123Z INFO pipeline.offload stored blocks=8``."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        parts = [
            f"{moment}.{int(record.msecs):03d}Z",
            record.levelname,
            record.name.removeprefix(f"{_ROOT}."),
            record.getMessage(),
        ]
        fields = getattr(record, "kvtc", None)
        if isinstance(fields, Mapping):
            parts.extend(f"{key}={_value(value)}" for key, value in fields.items())
        if record.exc_info:
            parts.append(f"exception={json.dumps(self.formatException(record.exc_info), ensure_ascii=False)}")
        return " ".join(parts).replace("\n", "\\n")


class _StderrHandler(logging.Handler):
    """Writes lines to what ``sys.stderr`` is at the time."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(LineFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
        except Exception:
            self.handleError(record)


def configure_logging(level: str = "info", *, replace: bool = True) -> None:
    """Send the package's logs to standard error, one line each.

    Parameters
    ----------
    level : str
        One of `LOG_LEVELS`.
    replace : bool
        False leaves logging as it is if the host or an earlier call has set it up.

    Raises
    ------
    ValueError
        If the level has another name.
    """
    if level not in LOG_LEVELS:
        raise ValueError(f"log level {level!r} is not one of {', '.join(LOG_LEVELS)}")
    logger = logging.getLogger(_ROOT)
    if logger.hasHandlers() and not replace:
        return
    if not any(isinstance(handler, _StderrHandler) for handler in logger.handlers):
        logger.addHandler(_StderrHandler())
    logger.setLevel(level.upper())
