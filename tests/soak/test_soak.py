"""A few seconds of what ``make soak`` does for minutes."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.soak.artifact import write_soak_artifact
from benchmarks.soak.run import SoakSettings, soak


@pytest.fixture
def thawed() -> Iterator[None]:
    """The soak takes what there is out of the garbage collector's sight; later tests want it back."""
    yield
    gc.unfreeze()


async def test_many_sessions_at_once_get_right_kv_and_leave_nothing(tmp_path: Path, thawed: None) -> None:
    write_soak_artifact(tmp_path / "artifact")
    measured = await soak(SoakSettings(seconds=4, sessions=120, samples=4), tmp_path / "artifact")
    assert measured["wrong"] == 0
    assert measured["outcomes"]["onboarded"] > 0 and measured["outcomes"]["stored"] > 0
    assert (
        measured["outcomes"].get("missed", 0)
        == measured["missed"]["error"]
        == measured["dropped"]["error"]
        == 0
    )
    assert measured["host"]["most_allocated_bytes"] <= measured["host"]["capacity_bytes"]
    assert measured["pinned_at_the_end"] == measured["staging_leased_at_the_end"] == 0
    assert measured["growth_in_the_second_half"]["file_descriptors"] <= 4
    assert measured["event_loop"]["samples"] > 0
