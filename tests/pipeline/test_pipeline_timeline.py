import pytest

from dynamo_kvtc.pipeline.timeline import Interval, Timeline


def timeline(*spans: tuple[str, float, float]) -> Timeline:
    return Timeline(intervals=[Interval(stage, 0, 0, 1, start, stop) for stage, start, stop in spans])


def test_busy_time_counts_overlapping_intervals_of_a_stage_once() -> None:
    line = timeline(("transfer", 0, 4), ("transfer", 2, 5), ("transfer", 7, 8), ("open", 0, 8))
    assert line.busy_s("transfer") == 6
    assert line.busy_s() == 8


def test_overlap_is_one_for_serial_stages_and_two_for_parallel_ones() -> None:
    assert timeline(("transfer", 0, 2), ("open", 2, 3), ("project", 3, 4)).overlap == 1
    assert timeline(("transfer", 0, 4), ("open", 0, 2), ("project", 2, 4)).overlap == 2


def test_a_failing_stage_is_recorded_too() -> None:
    line = Timeline()
    with pytest.raises(ValueError, match="broken"), line.record("transfer", 1, 2, 3):
        raise ValueError("broken")
    (interval,) = line.intervals
    assert (interval.stage, interval.group, interval.first_block, interval.num_blocks) == (
        "transfer",
        1,
        2,
        3,
    )
    assert interval.stop >= interval.start


def test_an_empty_timeline_has_no_time_and_no_overlap() -> None:
    assert Timeline().wall_s == 0
    assert Timeline().overlap == 1
