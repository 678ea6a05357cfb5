"""``python -m benchmarks.soak``: exit code 1 if a wrong value was onboarded or something was left behind."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from pathlib import Path

from benchmarks.soak.artifact import write_soak_artifact
from benchmarks.soak.run import SoakSettings, soak
from dynamo_kvtc.evaluation.environment import describe_environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=SoakSettings.seconds)
    parser.add_argument("--sessions", type=int, default=SoakSettings.sessions)
    parser.add_argument("--seed", type=int, default=SoakSettings.seed)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the result")
    arguments = parser.parse_args()
    settings = SoakSettings(arguments.seconds, arguments.sessions, arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        write_soak_artifact(Path(folder) / "artifact")
        measured = asyncio.run(soak(settings, Path(folder) / "artifact"))
    result = {"benchmark": "Soak", "seed": settings.seed, **measured, "environment": describe_environment()}
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(bool(result["wrong"] or result["pinned_at_the_end"] or result["staging_leased_at_the_end"]))


if __name__ == "__main__":
    main()
