"""Values that several commands take in the same notation."""

from __future__ import annotations

import math

import typer

from dynamo_kvtc.config.units import parse_size

__all__ = ["parse_bytes", "parse_divergences", "parse_ratios"]


def parse_bytes(text: str, option: str) -> int:
    """Read a size such as ``128GiB``, or a number of bytes.

    Raises
    ------
    typer.BadParameter
        Naming `option`, if `text` is anything else.
    """
    try:
        return int(text) if text.isdecimal() else parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def parse_ratios(text: str) -> list[float]:
    """Read ratios separated by commas, such as ``8,16,32``.

    Raises
    ------
    typer.BadParameter
        If `text` is anything else, or a ratio is not a positive number.
    """
    return _parse_positive(text, "ratios such as 8,16,32", "--ratios")


def parse_divergences(text: str) -> list[float]:
    """Read divergences (nats) separated by commas, such as ``0.004,0.015``.

    Raises
    ------
    typer.BadParameter
        If `text` is anything else, or a divergence is not a positive number.
    """
    return _parse_positive(text, "divergences such as 0.004,0.015", "--max-kl")


def _parse_positive(text: str, what: str, option: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(math.isfinite(number) and number > 0 for number in numbers):
        raise typer.BadParameter(f"{text!r} is no list of {what}", param_hint=option)
    return numbers
