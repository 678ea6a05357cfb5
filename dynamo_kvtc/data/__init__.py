"""Files that ship with the package: texts for calibration and evaluation."""

from __future__ import annotations

from pathlib import Path

__all__ = ["CALIBRATION_TEXTS", "HELDOUT_TEXTS"]

_TEXT = Path(__file__).parent / "text"

#: Text to calibrate the demo's model on: prose and technical.
CALIBRATION_TEXTS: tuple[Path, ...] = (_TEXT / "prose-calibration.txt", _TEXT / "technical-calibration.txt")

#: Text to measure on; disjoint from `CALIBRATION_TEXTS`.
HELDOUT_TEXTS: tuple[Path, ...] = (_TEXT / "prose-heldout.txt", _TEXT / "technical-heldout.txt")
