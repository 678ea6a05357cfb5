"""Errors that outlive what failed must not keep alive what it had in its hands.

An error holds its traceback, that holds the frames it has passed through, and those hold what they had
opened: memory of a device among it.
"""

from __future__ import annotations

from typing import TypeVar

__all__ = ["without_frames"]

E = TypeVar("E", bound=BaseException)


def without_frames(error: E) -> E:
    """Return an error after its traceback, and those of the errors behind it, have been let go."""
    behind: list[BaseException | None] = [error]
    seen: set[int] = set()
    while behind:
        one = behind.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            one.__traceback__ = None
            behind += [one.__cause__, one.__context__]
    return error
