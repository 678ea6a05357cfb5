"""``python -m benchmarks.crash``: exit code 1 if anything was lost or wrong."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.crash.run import kill_often
from dynamo_kvtc.evaluation.environment import describe_environment

_NAMES = {1: "one worker", 2: "two workers in one folder"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--folder", type=Path, help="on the file system to test; a temporary folder by default"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the result, or add to it")
    parser.add_argument(
        "--workers", type=int, nargs="+", choices=_NAMES, default=list(_NAMES), help="in one folder at once"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=float("inf"),
        help="end earlier: the result says how many kills there were",
    )
    arguments = parser.parse_args()
    result: dict[str, Any] = {}
    if arguments.json and arguments.json.exists():
        # What is not run now keeps what was recorded.
        result = json.loads(arguments.json.read_text())
    failed = False
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for workers in arguments.workers:
            start = time.perf_counter()
            tally = asyncio.run(
                kill_often(
                    arguments.kills,
                    Path(folder) / "tier",
                    seed=arguments.seed,
                    workers=workers,
                    limit_s=arguments.seconds,
                )
            )
            failed |= bool(tally.lost or tally.wrong or tally.damaged)
            result = {
                "benchmark": "Processes killed while they write",
                **{name: result[name] for name in _NAMES.values() if name in result},
                _NAMES[workers]: {
                    "seed": arguments.seed,
                    "seconds": round(time.perf_counter() - start, 1),
                    "file_system": _file_system(Path(folder)),
                    **tally.as_dict(),
                },
                "environment": describe_environment(),
            }
            print(json.dumps(result[_NAMES[workers]], indent=2), flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(failed)


def _file_system(folder: Path) -> str:
    """Return the type of the file system that a folder lies on."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    holding = [(place, kind) for place, kind in mounts if folder.is_relative_to(place)]
    return max(holding, key=lambda mount: len(mount[0]))[1]


if __name__ == "__main__":
    main()
