"""Sizes and durations with units, as pydantic field types."""

from __future__ import annotations

import re
from copy import deepcopy
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer

__all__ = [
    "MAX_DURATION_S",
    "MAX_SIZE",
    "Duration",
    "Size",
    "format_duration",
    "format_size",
    "parse_duration",
    "parse_size",
]

_SIZE_UNITS: dict[str, int] = {
    "b": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", 1)},
    **{f"{letter}i": 1024**power for power, letter in enumerate("kmgt", 1)},
}

_DURATION_UNITS: dict[str, Fraction] = {
    "us": Fraction(1, 1_000_000),
    "ms": Fraction(1, 1000),
    "s": Fraction(1),
    "min": Fraction(60),
    "h": Fraction(3600),
}

#: Largest size, in bytes (4 EiB), and longest duration, in seconds (30 days): what lies
#: beyond them is a slip of the pen, and more than the operating system's calls can take.
MAX_SIZE = 1 << 62
MAX_DURATION_S = 30 * 24 * 3600

_QUANTITY = re.compile(r"(\d{1,20}(?:\.\d{1,9})?)\s*([A-Za-z]+)")


def _split(text: str) -> tuple[Fraction, str] | None:
    """Split a quantity such as ``1.5 GiB`` into its number and its unit."""
    match = _QUANTITY.fullmatch(text.strip())
    return (Fraction(match[1]), match[2]) if match else None


def parse_size(value: object) -> int:
    """Return a size in bytes.

    Parameters
    ----------
    value : object
        An integer number of bytes, or a string such as ``"4GiB"``, ``"500 MB"``, ``"8Gi"``.

    Raises
    ------
    ValueError
        If it is neither, not a whole number of bytes, or more than `MAX_SIZE`.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return _bounded_size(value, value)
    quantity = _split(value) if isinstance(value, str) else None
    if quantity is None or quantity[1].lower() not in _SIZE_UNITS:
        raise ValueError(f"{value!r} is not a size; write for example 4GiB, 500MB or a number of bytes")
    nbytes = quantity[0] * _SIZE_UNITS[quantity[1].lower()]
    if nbytes.denominator != 1:
        raise ValueError(f"{value!r} is not a whole number of bytes")
    return _bounded_size(int(nbytes), value)


def _bounded_size(nbytes: int, written: object) -> int:
    if nbytes > MAX_SIZE:
        raise ValueError(
            f"{written!r} is more than any machine has; the largest size is {MAX_SIZE >> 50} PiB"
        )
    return nbytes


def format_size(nbytes: int) -> str:
    """Write a size exactly, in the largest binary unit that divides it: ``4294967296`` is ``4GiB``."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if nbytes and nbytes % 1024**power == 0:
            return f"{nbytes // 1024**power}{unit}"
    return f"{nbytes}B"


def parse_duration(value: object) -> float:
    """Return a duration in seconds.

    Parameters
    ----------
    value : object
        A string with a unit: ``"200ms"``, ``"5s"``, ``"1.5 min"``. A bare number is refused, since
        nobody can tell whether it means seconds or milliseconds.

    Raises
    ------
    ValueError
        If it is anything else, or more than `MAX_DURATION_S`.
    """
    quantity = _split(value) if isinstance(value, str) else None
    if quantity is None or quantity[1].lower() not in _DURATION_UNITS:
        raise ValueError(f"{value!r} is not a duration; write for example 200ms, 5s or 2min")
    seconds = quantity[0] * _DURATION_UNITS[quantity[1].lower()]
    if seconds > MAX_DURATION_S:
        raise ValueError(f"{value!r} is no deadline; the longest duration is {MAX_DURATION_S // 3600} h")
    return float(seconds)


def format_duration(seconds: float) -> str:
    """Write a duration, to the microsecond, in the largest unit that gives a whole number: ``200ms``."""
    exact = Fraction(seconds).limit_denominator(1_000_000)
    for unit in ("h", "min", "s", "ms"):
        count = exact / _DURATION_UNITS[unit]
        if count and count.denominator == 1:
            return f"{count}{unit}"
    return f"{round(exact / _DURATION_UNITS['us'])}us"


@dataclass(frozen=True, eq=False)  # hashable, for unions with None
class _JsonSchema:
    """The JSON schema of a field type. pydantic's own `WithJsonSchema` shares one dict among all fields."""

    schema: dict[str, Any]

    def __get_pydantic_json_schema__(self, core_schema: Any, handler: Any) -> dict[str, Any]:
        return deepcopy(self.schema)


#: Bytes, written as an integer or as a string with a unit.
Size = Annotated[
    int,
    BeforeValidator(parse_size),
    PlainSerializer(format_size, return_type=str, when_used="json"),
    _JsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1},
                {"type": "string", "pattern": r"^\s*[0-9]+(\.[0-9]+)?\s*([kKmMgGtT][iI]?)?[bB]\s*$"},
                {"type": "string", "pattern": r"^\s*[0-9]+(\.[0-9]+)?\s*[kKmMgGtT]i\s*$"},
            ]
        }
    ),
]

#: Seconds, written as a string with a unit.
Duration = Annotated[
    float,
    BeforeValidator(parse_duration),
    PlainSerializer(format_duration, return_type=str, when_used="json"),
    _JsonSchema({"type": "string", "pattern": r"^\s*[0-9]+(\.[0-9]+)?\s*(us|ms|s|min|h)\s*$"}),
]
