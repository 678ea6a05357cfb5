"""The violations that the specification's decoder reports."""

from __future__ import annotations


class SpecError(Exception):
    """A violation; `kind` is the error's name in section 9."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


def require(condition: bool, kind: str) -> None:
    if not condition:
        raise SpecError(kind)
