"""Sizes and durations."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_kvtc.config.units import format_duration, format_size, parse_duration, parse_size


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0B", 0),
        ("512B", 512),
        ("500MB", 500_000_000),
        ("500 mb", 500_000_000),
        ("4GiB", 4 * 2**30),
        ("8Gi", 8 * 2**30),
        ("1.5 GiB", 3 * 2**29),
        (" 2TiB ", 2 * 2**40),
        (4096, 4096),
    ],
)
def test_sizes_take_units(text: object, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "4", "4 bananas", "-1GiB", "1e3MB", "0.3B", 1.5, True, None, "9" * 99 + "B"]
)
def test_what_is_not_a_size_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match=r"size|whole number"):
        parse_size(text)


@given(st.integers(0, 2**62))
def test_a_formatted_size_reads_back_exactly(nbytes: int) -> None:
    assert parse_size(format_size(nbytes)) == nbytes


@pytest.mark.parametrize(
    ("text", "seconds"), [("200ms", 0.2), ("5s", 5.0), ("1.5 min", 90.0), ("2h", 7200.0), ("50us", 5e-5)]
)
def test_durations_take_units(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", [5, 5.0, "5", "s", "5 years", "-5s", None, True])
def test_a_duration_without_a_unit_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="not a duration"):
        parse_duration(text)


@given(st.integers(1, 10**12))
def test_a_formatted_duration_reads_back(microseconds: int) -> None:
    seconds = microseconds / 1e6
    assert parse_duration(format_duration(seconds)) == pytest.approx(seconds, rel=1e-9)
