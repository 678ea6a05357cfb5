"""What all sections of the configuration have in common, and the types of values that several use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, WithJsonSchema

__all__ = ["ConfigPath", "Divergence", "Ratio", "Section", "check_one_plan", "null_is_empty"]


def resolve_path(value: object, info: ValidationInfo) -> object:
    """Make a path absolute: ``~`` is the home folder, relative paths start at the file's folder."""
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError(f"{value!r} is not a path")
    path = Path(value).expanduser()
    folder = (info.context or {}).get("folder")
    return Path(folder, path) if folder is not None else path


#: A path; relative ones are resolved against the folder of the configuration file.
ConfigPath = Annotated[
    Path, BeforeValidator(resolve_path), WithJsonSchema({"type": "string", "minLength": 1})
]


class Section(BaseModel):
    """A mapping with known keys only. No value is coerced from another type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


Ratio = Annotated[float, Field(ge=1, le=4096)]
Divergence = Annotated[float, Field(gt=0, le=100)]


def check_one_plan(ratio: float | None, max_kl: float | None) -> None:
    """Refuse, with a `ValueError`, a plan that is chosen twice."""
    if ratio is not None and max_kl is not None:
        raise ValueError("ratio and max_kl both choose the plan; give one of them")


def null_is_empty(value: object) -> object:
    """Return an empty mapping for null: a section whose lines are all commented out reads as that."""
    return {} if value is None else value
