"""Formatting of sizes, rates and durations; where output goes."""

from __future__ import annotations

import json

import pytest

from dynamo_kvtc.cli import output
from dynamo_kvtc.errors import KvtcError


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**30, "3.0 GiB"), (5000 * 2**40, "5000.0 TiB")],
)
def test_bytes(nbytes: int, text: str) -> None:
    assert output.format_bytes(nbytes) == text


@pytest.mark.parametrize(("rate", "text"), [(2.5e6, "2.5 MB/s"), (1.5e9, "1.50 GB/s")])
def test_rates(rate: float, text: str) -> None:
    assert output.format_rate(rate) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4e-6, "4 us"), (0.0042, "4.2 ms"), (1.25, "1.2 s"), (119.0, "119.0 s"), (150.4, "2 min 30 s")],
)
def test_seconds(seconds: float, text: str) -> None:
    assert output.format_seconds(seconds) == text


def test_tables_go_to_stdout_with_brackets_intact(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_table(output.make_table("[one]", ("name", "size[b]"), [("a[0]", 1), ("b", "x" * 90)]))
    shown = capsys.readouterr()
    assert "[one]" in shown.out and "size[b]" in shown.out and "a[0]" in shown.out
    assert "x" * 90 in shown.out
    assert shown.err == ""


def test_json_goes_to_stdout_alone_and_refuses_nan(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_json({"grösse": [1, 2.5]})
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"grösse": [1, 2.5]}
    assert shown.err == ""
    with pytest.raises(ValueError, match="JSON"):
        output.print_json({"bad": float("nan")})


def test_errors_and_notes_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_error(KvtcError("a [bold] long " + "word " * 60))
    output.print_note("see [here]")
    shown = capsys.readouterr()
    assert shown.out == ""
    first, second = shown.err.splitlines()
    assert first.startswith("error: a [bold] long word") and second == "see [here]"
