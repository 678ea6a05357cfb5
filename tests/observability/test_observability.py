"""Counters, their snapshot, one-line logs."""

from __future__ import annotations

import json
import logging
import threading
from typing import get_args

import pytest

from dynamo_kvtc import errors
from dynamo_kvtc.observability import Counters, DropReason, MissReason, configure_logging, miss_reason
from dynamo_kvtc.observability.logs import LineFormatter


def test_a_new_snapshot_is_empty_and_names_every_reason() -> None:
    snapshot = Counters().snapshot()
    assert snapshot.offload_ratio is None and snapshot.hit_rate is None
    assert set(snapshot.dropped_blocks) == set(get_args(DropReason))
    assert set(snapshot.missed_blocks) == set(get_args(MissReason))
    assert sum(snapshot.dropped_blocks.values()) == sum(snapshot.missed_blocks.values()) == 0


def test_what_is_counted_is_in_the_snapshot() -> None:
    counters = Counters()
    counters.looked_up(asked_blocks=8, found_blocks=6)
    counters.offloaded(blocks=2, tokens=512, raw_bytes=3000, stored_bytes=200)
    counters.onboarded(blocks=1, tokens=256, raw_bytes=1500, stored_bytes=100)
    counters.dropped("queue_full", 3)
    counters.missed("damaged")
    counters.add_seconds("encode", 0.5)
    snapshot = counters.snapshot()
    assert snapshot.hit_rate == 0.75
    assert snapshot.offload_ratio == 15
    assert (snapshot.offloaded_blocks, snapshot.offloaded_tokens) == (2, 512)
    assert (snapshot.onboarded_blocks, snapshot.onboarded_tokens) == (1, 256)
    assert (snapshot.onboarded_raw_bytes, snapshot.onboarded_stored_bytes) == (1500, 100)
    assert snapshot.dropped_blocks["queue_full"] == 3
    assert snapshot.missed_blocks["damaged"] == 1
    assert snapshot.stage_seconds["encode"] == 0.5
    assert json.loads(json.dumps(snapshot.to_dict()))["offload_ratio"] == 15


def test_a_snapshot_does_not_change_later() -> None:
    counters = Counters()
    before = counters.snapshot()
    counters.dropped("closed")
    counters.offloaded(1, 2, 3, 4)
    assert before.dropped_blocks["closed"] == before.offloaded_blocks == 0


def test_time_is_counted_when_the_stage_fails() -> None:
    counters = Counters()
    with pytest.raises(ValueError, match="broken"), counters.timed("decode"):
        raise ValueError("broken")
    assert counters.snapshot().stage_seconds["decode"] > 0


def test_threads_lose_no_count() -> None:
    counters = Counters()

    def work() -> None:
        for _ in range(500):
            counters.offloaded(1, 2, 3, 4)
            counters.missed("timeout")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    snapshot = counters.snapshot()
    assert (snapshot.offloaded_blocks, snapshot.offloaded_stored_bytes) == (4000, 16000)
    assert snapshot.missed_blocks["timeout"] == 4000


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (errors.ObjectMissingError("x"), "missing"),
        (errors.ObjectCorruptError("x"), "damaged"),
        (errors.ChunkChecksumError("x"), "damaged"),
        (errors.StreamMismatchError("x"), "mismatch"),
        (errors.TransferTimeoutError("x"), "timeout"),
        (errors.TransferError("x"), "transfer"),
        (errors.TierClosedError("x"), "closed"),
        (errors.OnboardCancelledError("x"), "cancelled"),
        (errors.LayoutError("x"), "error"),
        (ValueError("x"), "error"),
    ],
)
def test_every_error_has_a_reason(error: Exception, reason: str) -> None:
    assert miss_reason(error) == reason


def record(message: str, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("dynamo_kvtc.pipeline.offload", logging.INFO, "f.py", 1, message, None, None)
    made.__dict__.update(extra)
    return made


def test_a_log_line_has_its_fields_and_is_one_line() -> None:
    line = LineFormatter().format(
        record("stored\nblocks", kvtc={"blocks": 8, "why": "disk is full", "empty": ""})
    )
    assert line.endswith('INFO pipeline.offload stored\\nblocks blocks=8 why="disk is full" empty=""')
    assert "\n" not in line


def test_a_traceback_stays_on_the_line() -> None:
    made = record("failed")
    try:
        raise ValueError("inner")
    except ValueError as error:
        made.exc_info = (ValueError, error, error.__traceback__)
    line = LineFormatter().format(made)
    assert "\n" not in line and "ValueError: inner" in line


@pytest.fixture
def logger(monkeypatch: pytest.MonkeyPatch) -> logging.Logger:
    """The package's logger as in a fresh process: pytest's own handlers sit on the root logger."""
    logger = logging.getLogger("dynamo_kvtc")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", False)
    return logger


def test_logging_is_set_up_once_and_its_level_can_change(
    logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging("info", replace=False)
    configure_logging("error")
    configure_logging("debug", replace=False)
    logging.getLogger("dynamo_kvtc.tiers").warning("not shown")
    logging.getLogger("dynamo_kvtc.tiers").error("shown")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("ERROR tiers shown")


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="not one of debug"):
        configure_logging("loud")
