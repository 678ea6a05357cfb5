"""A small rd artifact for the soak: nothing in it is fitted, every part of it is real."""

from __future__ import annotations

import sys
from pathlib import Path

from dynamo_kvtc.codec.geometry import KvGeometry, LayerRange

__all__ = ["write_soak_artifact"]


def write_soak_artifact(folder: Path) -> None:
    """Write an artifact of two layer groups for 4 layers, 2 KV heads of 16."""
    # The maker of random artifacts is part of the tests.
    sys.path.append(str(Path(__file__).parents[2] / "tests"))
    from random_rd import write_random_rd_artifact  # type: ignore[import-not-found]

    write_random_rd_artifact(
        folder,
        geometry=KvGeometry(4, 2, 16, "bfloat16"),
        groups=(LayerRange(0, 2), LayerRange(2, 2)),
    )
