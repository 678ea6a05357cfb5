"""Reading a configuration file: strict YAML, environment overrides, errors that name the place."""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from dynamo_kvtc.config.models import Config, DiskTierConfig, HostTierConfig, ObjectTierConfig
from dynamo_kvtc.errors import ConfigError

__all__ = ["ENV_PREFIX", "Problem", "check_config", "load_config"]

#: Environment variables ``DYNAMO_KVTC__SECTION__KEY`` override single values; list items by number.
ENV_PREFIX = "DYNAMO_KVTC__"

#: Largest file that is read, in bytes.
MAX_FILE_BYTES = 1024**2

_TIER_MODELS: dict[object, type[BaseModel]] = {
    "host": HostTierConfig,
    "disk": DiskTierConfig,
    "object": ObjectTierConfig,
}

_UNKNOWN_KIND = f"needs a kind; known kinds: {', '.join(map(str, _TIER_MODELS))}"

#: Messages by pydantic's error type, where its own would speak of Python.
_PLAIN_MESSAGES: dict[str, str] = {
    "union_tag_invalid": _UNKNOWN_KIND,
    "union_tag_not_found": _UNKNOWN_KIND,
    "model_type": "must hold keys and values, indented below it",
    "model_attributes_type": "must hold keys and values, indented below it",
    "list_type": "must be a list; begin each item with a dash",
    "too_short": "needs at least one item",
    "invalid_key": "keys are words",
}

#: Keys whose values are never shown.
_SECRET_KEYS = frozenset({"salt"})

_Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a configuration.

    Attributes
    ----------
    where : str
        The key's path, such as ``tiers[0].capacity``; empty for the file as a whole.
    source : str
        ``"line 7"``, or the name of the environment variable that set the value; empty if unknown.
    message : str
        What is wrong and what to do about it.
    """

    where: str
    source: str
    message: str

    def __str__(self) -> str:
        source = f" ({self.source})" if self.source else ""
        return f"{self.where}{source}: {self.message}" if self.where else f"{self.message}{source}"


class _Reading:
    """A configuration on its way from text to values: the data, where each came from, the problems."""

    def __init__(self) -> None:
        self.data: Any = None
        self.sources: dict[_Path, str] = {}
        self.problems: list[Problem] = []

    def report(self, path: _Path, message: str) -> None:
        """Note a problem at a path."""
        nearest = path
        while nearest and nearest not in self.sources:
            nearest = nearest[:-1]
        self.problems.append(Problem(_dotted(path), self.sources.get(nearest, ""), message))


class _Loader(yaml.SafeLoader):
    """Plain values only: no anchors, which could multiply a small file, and no tags.

    With a tag a value can be claimed to be what it is not, where PyYAML's constructors fail in ways of
    their own.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        events: Any = self  # the stubs leave the parser's methods untyped
        event = events.peek_event()
        mark = event.start_mark
        if isinstance(event, yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not supported", mark)
        if getattr(event, "tag", None) is not None:
            raise yaml.composer.ComposerError(None, None, "tags are not supported", mark)
        return super().compose_node(parent, index)


def load_config(path: str | os.PathLike[str], env: Mapping[str, str] = os.environ) -> Config:
    """Read and validate a configuration file.

    Parameters
    ----------
    path : str or os.PathLike
        The YAML file. Relative paths in it are resolved against its folder.
    env : Mapping[str, str]
        Environment variables; those that begin with `ENV_PREFIX` override single values of the file.

    Raises
    ------
    ConfigError
        If anything is wrong; the message lists every problem.
    """
    config, problems = check_config(path, env)
    if config is None:
        raise ConfigError(f"{path}: " + "; ".join(map(str, problems)))
    return config


def check_config(
    path: str | os.PathLike[str], env: Mapping[str, str] = os.environ
) -> tuple[Config | None, list[Problem]]:
    """Read a configuration file; return the settings, or None and every problem found."""
    reading = _Reading()
    _read_yaml(Path(path), reading)
    if not isinstance(reading.data, dict):
        return None, reading.problems
    _apply_environment(reading, env)
    try:
        config = Config.model_validate(reading.data, context={"folder": Path(path).resolve().parent})
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            place = _place(detail["loc"], reading.data)
            reading.report(place, _message(detail, _model_at(detail["loc"])))
        return None, reading.problems
    return (None if reading.problems else config), reading.problems


def _read_yaml(path: Path, reading: _Reading) -> None:
    try:
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "it is not a file")
        with path.open("rb") as file:
            text = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        reading.report((), f"cannot be read: {error.strerror}")
        return
    if len(text) > MAX_FILE_BYTES:
        reading.report((), f"the file is larger than {MAX_FILE_BYTES} bytes; is it a configuration file?")
        return
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is not None:
                _walk(node, (), 1, reading)
                reading.data = loader.construct_document(node)
        finally:
            loader.dispose()
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        reading.report((), f"not valid YAML: {' '.join(str(error).split()) or type(error).__name__}")
        return
    if not isinstance(reading.data, dict):
        reading.report((), "the file must hold keys and values, such as `tiers:`")


def _walk(node: yaml.Node, path: _Path, line: int, reading: _Reading) -> None:
    """Note the line of every value and report keys that stand twice in one mapping."""
    if path:
        reading.sources[path] = f"line {line}"
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _walk(item, (*path, index), item.start_mark.line + 1, reading)
    elif isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in seen:
                reading.report((*path, name), f"stands twice, in lines {seen[name]} and {line}; keep one")
            seen.setdefault(name, line)
            _walk(value, (*path, name), line, reading)


def _apply_environment(reading: _Reading, env: Mapping[str, str]) -> None:
    for variable in sorted(name for name in env if name.startswith(ENV_PREFIX)):
        parts = variable.removeprefix(ENV_PREFIX).lower().split("__")
        path: _Path = tuple(int(part) if part.isdecimal() else part for part in parts)
        reading.sources[path] = variable
        try:
            value = yaml.load(env[variable], Loader=_Loader)
        except (yaml.YAMLError, ValueError, RecursionError):
            value = env[variable]
        if isinstance(value, dict | list):
            reading.report(path, "an environment variable sets one value, not a list or a mapping")
        elif not _assign(reading.data, path, value):
            reading.report(path, "there is no such place in the file; variables override single values")


def _assign(data: Any, path: _Path, value: object) -> bool:
    """Set a value deep in nested mappings and lists, making missing mappings; False if it cannot be."""
    for part, following in zip(path, (*path[1:], None), strict=True):
        if isinstance(data, list):
            if not isinstance(part, int) or part >= len(data):
                return False
        elif not isinstance(data, dict) or isinstance(part, int) or not part:
            return False
        elif following is not None and data.get(part) is None:
            data[part] = {}
        if following is None:
            data[part] = value
        else:
            data = data[part]
    return True


def _place(loc: Sequence[str | int], data: Any) -> _Path:
    """Turn pydantic's location into a path of the file: it names the chosen tier kind in between."""
    path: list[str | int] = []
    for index, part in enumerate(loc):
        is_last = index == len(loc) - 1
        if isinstance(data, dict) and part not in data and not is_last:
            continue
        path.append(part)
        if isinstance(data, dict):
            data = data.get(part)
        elif isinstance(data, list) and isinstance(part, int) and part < len(data):
            data = data[part]
    return tuple(path)


def _model_at(loc: Sequence[str | int]) -> type[BaseModel]:
    """Return the model whose keys are the siblings of a location's last part."""
    model: type[BaseModel] = Config
    for part in loc[:-1]:
        field = model.model_fields.get(str(part))
        inner = _sections(field.annotation) if field else {_TIER_MODELS.get(part)}
        if len(inner) == 1 and (only := inner.pop()) is not None:
            model = only
    return model


def _sections(annotation: Any) -> set[type[BaseModel] | None]:
    """Return the models in a field's type: its own, one that may be null, that of a list's items."""
    # Python 3.10 takes list[...] for a class.
    if get_origin(annotation) is None and isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation}
    return {model for part in get_args(annotation) for model in _sections(part)}


def _message(detail: Any, model: type[BaseModel]) -> str:
    """Say what is wrong in the product's words; pydantic's own where they are clear."""
    kind, key = detail["type"], str(detail["loc"][-1]) if detail["loc"] else ""
    if kind in _PLAIN_MESSAGES:
        return _PLAIN_MESSAGES[kind]
    if kind == "extra_forbidden":
        known = sorted(model.model_fields)
        closest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
        return f"unknown key; did you mean {closest[0]}? Known here: {', '.join(known)}"
    if kind == "missing":
        return f"is missing: {model.model_fields[key].description}"
    if kind == "literal_error":
        choices = get_args(model.model_fields[key].annotation)
        return f"{detail['input']!r} is not one of {', '.join(map(str, choices))}"
    if kind == "value_error":
        return str(detail["ctx"]["error"])
    plain = f"{detail['msg'][0].lower()}{detail['msg'][1:]}"
    return plain if key in _SECRET_KEYS else f"{plain}, not {detail['input']!r}"


def _dotted(path: _Path) -> str:
    """Write a path as people do: ``tiers[0].capacity``."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")
