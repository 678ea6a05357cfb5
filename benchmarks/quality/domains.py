"""The domains of text: what is calibrated on, and what is measured on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dynamo_kvtc.data import CALIBRATION_TEXTS, HELDOUT_TEXTS

__all__ = ["DOMAINS", "Domain"]

_TEXTS = Path(__file__).parent / "texts"


@dataclass(frozen=True)
class Domain:
    """Two disjoint texts of one kind, 110 to 230 KB each.

    Attributes
    ----------
    calibration, heldout : Path
        UTF-8 files.
    """

    calibration: Path
    heldout: Path


#: The domains by name.
DOMAINS: dict[str, Domain] = {
    "prose": Domain(CALIBRATION_TEXTS[0], HELDOUT_TEXTS[0]),
    "technical": Domain(CALIBRATION_TEXTS[1], HELDOUT_TEXTS[1]),
    "code": Domain(_TEXTS / "code-calibration.txt", _TEXTS / "code-heldout.txt"),
    "dialogue": Domain(_TEXTS / "dialogue-calibration.txt", _TEXTS / "dialogue-heldout.txt"),
}
