"""``python -m benchmarks.fuzz``: the whole run, or a part of it; exit code 1 if anything was found."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.fuzz.run import TARGETS, replay, run_target, summary
from dynamo_kvtc.evaluation.environment import describe_environment

#: Cases of the whole run, by target.
_CASES = {
    "stream": 10_000_000,
    "segment": 1_000_000,
    "payload": 200_000,
    "artifact": 200_000,
    "config": 100_000,
    "folder": 50_000,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(_CASES))
    parser.add_argument("--scale", type=float, default=1.0, help="share of the whole run")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--keep", type=Path, default=Path("fuzz-output"), help="where findings are written")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the result, or add to it")
    parser.add_argument("--replay", metavar="PLACE", help="judge one case again, as a finding names it")
    arguments = parser.parse_args()
    if arguments.replay:
        print(replay(arguments.replay))
        return
    results: dict[str, Any] = {}
    if arguments.json and arguments.json.exists():
        # Targets that are not run now keep what was recorded.
        results = json.loads(arguments.json.read_text())["targets"]
    for name in arguments.targets:
        cases = round(_CASES[name] * arguments.scale)
        tally, seconds = run_target(
            name, cases, seed=arguments.seed, workers=arguments.workers, keep=arguments.keep
        )
        results[name] = summary(tally, seconds)
        print(f"{name}: {json.dumps(results[name], indent=2)}", flush=True)
        if arguments.json:
            result = {
                "benchmark": "Fuzzing of readers",
                "seed": arguments.seed,
                "workers": arguments.workers,
                "targets": results,
                "environment": describe_environment(),
            }
            arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    sys.exit(any(result["findings"] for result in results.values()))


if __name__ == "__main__":
    main()
