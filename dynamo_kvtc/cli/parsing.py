"""Values that several commands take in the same notation."""

from __future__ import annotations

import math

import typer

__all__ = ["parse_ratios"]


def parse_ratios(text: str) -> list[float]:
    """Read nominal ratios separated by commas, such as ``8,16,32``.

    Raises
    ------
    typer.BadParameter
        If `text` is anything else, or a ratio is not a positive number.
    """
    try:
        ratios = [float(part) for part in text.split(",")]
    except ValueError:
        ratios = []
    if not ratios or not all(math.isfinite(ratio) and ratio > 0 for ratio in ratios):
        raise typer.BadParameter(f"{text!r} is no list of ratios such as 8,16,32", param_hint="--ratios")
    return ratios
