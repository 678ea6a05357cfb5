"""Into what an onboard is cut: one layer group of a few consecutive tier blocks at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dynamo_kvtc.codec.bitstream import StreamHeader

__all__ = ["Unit", "cut_units"]


@dataclass(slots=True)
class Unit:
    """One layer group of tier blocks ``first .. first + count - 1`` of the request."""

    group: int
    first: int
    count: int

    @property
    def stop(self) -> int:
        """One past the last tier block."""
        return self.first + self.count


def cut_units(
    headers: Sequence[StreamHeader],
    num_groups: int,
    *,
    units: int,
    most_bytes: int,
    most_tokens: int | None = None,
) -> list[Unit]:
    """Cut a request in group-major order, so that the first layers' bytes come first.

    Parameters
    ----------
    headers : Sequence[StreamHeader]
        One for each tier block of the request.
    units : int
        About how many units are wanted in all.
    most_bytes : int
        Stored bytes that a unit of more than one tier block may have.
    most_tokens : int, optional
        Tokens that a unit of more than one tier block may have.
    """
    per_group = max(1, -(-units // num_groups))
    most_blocks = max(1, -(-len(headers) // per_group))
    cut: list[Unit] = []
    for group in range(num_groups):
        unit, nbytes, tokens = Unit(group, 0, 0), 0, 0
        for index, header in enumerate(headers):
            start, stop = header.group_span(group)
            if unit.count and (
                unit.count == most_blocks
                or nbytes + stop - start > most_bytes
                or (most_tokens is not None and tokens + header.num_tokens > most_tokens)
            ):
                cut.append(unit)
                unit, nbytes, tokens = Unit(group, index, 0), 0, 0
            unit.count += 1
            nbytes += stop - start
            tokens += header.num_tokens
        if unit.count:
            cut.append(unit)
    return cut
