"""The simulation runs from end to end, small: the tier of its plot serves what plain memory cannot hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_compressed_host_tier_serves_more_from_the_same_memory(tmp_path: Path) -> None:
    results, plot = tmp_path / "results.json", tmp_path / "plot.png"
    command = [sys.executable, "-m", "benchmarks.simulation", "--quick"]
    command += ["--results", str(results), "--plot", str(plot)]
    subprocess.run(command, cwd=ROOT, timeout=600, check=True)
    hits = {outcome["tier"]: outcome["hit_rate"] for outcome in json.loads(results.read_text())["outcomes"]}
    assert hits["compressed tier"] > hits["plain host memory"]
    assert hits["compressed tier"] > hits["no host tier"]
    assert plot.read_bytes().startswith(b"\x89PNG")
