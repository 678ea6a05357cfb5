"""A few rounds of what ``python -m benchmarks.crash`` does hundreds of times."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.crash.run import kill_often


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_killed_worker_loses_nothing_that_it_reported(tmp_path: Path, workers: int) -> None:
    tally = await kill_often(4, tmp_path / "tier", seed=11, workers=workers)
    assert tally.kills == 4
    assert tally.puts_reported > 0 and tally.objects_checked > 0
    assert (tally.lost, tally.wrong, tally.damaged, tally.findings) == (0, 0, 0, [])
