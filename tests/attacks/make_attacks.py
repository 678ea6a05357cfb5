"""Writes the attacks that do not exist yet: ``PYTHONPATH=. python tests/attacks/make_attacks.py``.

Each file (or artifact folder) below ``streams/``, ``segments/``, ``configs/`` and ``artifacts/`` is named by
what it does. `test_attacks.py` reads them all. Existing files are never overwritten.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

ATTACKS = Path(__file__).parent
sys.path[:0] = [str(ATTACKS), str(ATTACKS.parent)]

from artifact_attacks import ARTIFACT_ATTACKS, SOUND  # noqa: E402
from other_attacks import CONFIG_ATTACKS, SEGMENT_ATTACKS  # noqa: E402
from stream_attacks import STREAM_ATTACKS  # noqa: E402

__all__ = ["attack_files"]


def attack_files() -> Iterator[tuple[Path, bytes]]:
    """Every file of the corpus and its bytes."""
    for name, (make, _) in STREAM_ATTACKS.items():
        yield ATTACKS / "streams" / name, make()
    for name, (segment, _) in SEGMENT_ATTACKS.items():
        yield ATTACKS / "segments" / f"{name}.segment", segment()
    for name, (text, _) in CONFIG_ATTACKS.items():
        yield ATTACKS / "configs" / name, text.encode()
    for name, (folder, _) in ARTIFACT_ATTACKS.items():
        manifest, tensors = folder()
        yield ATTACKS / "artifacts" / name / "artifact.json", manifest
        yield ATTACKS / "artifacts" / name / "parameters.safetensors", tensors


def main() -> None:
    if not SOUND.exists():
        from random_rd import write_random_rd_artifact

        from dynamo_kvtc.codec.geometry import KvGeometry, LayerRange

        write_random_rd_artifact(SOUND, geometry=KvGeometry(1, 1, 8), groups=(LayerRange(0, 1),))
    for path, data in attack_files():
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            print(path.relative_to(ATTACKS))


if __name__ == "__main__":
    main()
