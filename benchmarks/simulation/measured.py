"""What the simulation takes from this project's own measurements."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Measured", "read_measured"]

#: Plain KV of the model that was measured, SmolLM2-135M in 16 bit: layers, K and V, heads, channels, bytes.
MEASURED_BYTES_PER_TOKEN = 30 * 2 * 3 * 64 * 2


@dataclass(frozen=True)
class Measured:
    """Ratios that were measured side by side in one run each.

    Attributes
    ----------
    ratio : float
        Plain bytes to stored bytes, everything counted.
    onboard_speed, encode_speed : float
        Computing the same tokens takes this many times as long as onboarding them from host memory, and as
        gathering and encoding them.
    tokens : int
        How many tokens were measured at once.
    """

    ratio: float
    onboard_speed: float
    encode_speed: float
    tokens: int


def read_measured(folder: Path) -> Measured:
    """Read them from the results of `onboard_vs_recompute.py` and `encode_vs_prefill.py`."""
    onboard, encode = (
        _read(folder / f"{name}.json") for name in ("onboard_vs_recompute", "encode_vs_prefill")
    )
    tokens = int(onboard["details"]["tokens"])
    return Measured(
        ratio=tokens * MEASURED_BYTES_PER_TOKEN / onboard["details"]["stored_bytes"],
        onboard_speed=onboard["ratios"]["recompute / onboard from host"]["value"],
        encode_speed=1 / encode["ratios"]["encode / prefill"]["value"],
        tokens=tokens,
    )


def _read(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result
