"""What an API server would say about a custom resource: its CRD's schema, unknown fields, and CEL rules."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import celpy
import celpy.celtypes
import jsonschema
import yaml

_NAME = "shared/crds/nvidia.com_dynamographdeployments.yaml"

#: Dynamo's CRD, in shared/ beside the repository or further up; None if it is not there.
CRD: Path | None = next(
    (folder / _NAME for folder in Path(__file__).parents[3:] if (folder / _NAME).is_file()), None
)


@functools.cache
def load_schema(version: str = "v1beta1") -> dict[str, Any]:
    assert CRD is not None
    crd = yaml.load(CRD.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (found,) = (entry for entry in crd["spec"]["versions"] if entry["name"] == version)
    assert found["served"]
    return found["schema"]["openAPIV3Schema"]


def strict(schema: Any) -> Any:
    """Refuse unknown fields wherever the schema does not ask to keep them, as a strict request does."""
    if isinstance(schema, list):
        return [strict(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items() if key != "properties"}
    if "properties" in schema:
        # A property may be named like a keyword: only the schemas below are treated as such.
        made["properties"] = {name: strict(entry) for name, entry in schema["properties"].items()}
        if "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            made["additionalProperties"] = False
    return made


@functools.cache
def _validator() -> jsonschema.Draft202012Validator:
    schema = strict(load_schema())
    # Every kind has more metadata than a CRD's schema says.
    schema["properties"]["metadata"] = {
        "type": "object",
        "additionalProperties": False,
        "required": ["name"],
        "properties": {
            "name": {"type": "string", "maxLength": 253},
            "namespace": {"type": "string"},
            **{
                name: {"type": "object", "additionalProperties": {"type": "string"}}
                for name in ("labels", "annotations")
            },
        },
    }
    return jsonschema.Draft202012Validator(schema)


def problems(resource: dict[str, Any]) -> list[str]:
    """Everything that is wrong with a resource that is created."""
    found = [
        f"{'.'.join(map(str, error.absolute_path))}: {error.message}"
        for error in _validator().iter_errors(resource)
    ]
    found += [f"{place}: duplicate {key}" for place, key in _duplicates(load_schema(), resource, "")]
    found += [f"{place}: {message}" for place, message in _broken_rules(load_schema(), resource, "")]
    return found


def rules(schema: dict[str, Any] | None = None) -> Iterator[str]:
    """Every CEL rule of the schema."""
    schema = load_schema() if schema is None else schema
    yield from (entry["rule"] for entry in schema.get("x-kubernetes-validations", ()))
    for _, child in _children(schema):
        yield from rules(child)


def _children(schema: dict[str, Any]) -> Iterator[tuple[str | None, dict[str, Any]]]:
    """Schemas below this one, by property; None stands for all items or all values."""
    yield from schema.get("properties", {}).items()
    for keyword in ("items", "additionalProperties"):
        if isinstance(schema.get(keyword), dict):
            yield None, schema[keyword]


def _below(schema: dict[str, Any], value: Any, place: str) -> Iterator[tuple[dict[str, Any], Any, str]]:
    for name, child in _children(schema):
        if name is not None:
            if isinstance(value, dict) and name in value:
                yield child, value[name], f"{place}.{name}"
        elif isinstance(value, list):
            yield from ((child, item, f"{place}[{index}]") for index, item in enumerate(value))
        elif isinstance(value, dict):
            known = schema.get("properties", {})
            yield from ((child, value[key], f"{place}.{key}") for key in value if key not in known)


def _duplicates(schema: dict[str, Any], value: Any, place: str) -> Iterator[tuple[str, Any]]:
    if schema.get("x-kubernetes-list-type") == "map" and isinstance(value, list):
        keys = [tuple(item.get(key) for key in schema["x-kubernetes-list-map-keys"]) for item in value]
        yield from ((place, key) for key in set(keys) if keys.count(key) > 1)
    for child, inner, where in _below(schema, value, place):
        yield from _duplicates(child, inner, where)


def _broken_rules(schema: dict[str, Any], value: Any, place: str) -> Iterator[tuple[str, str]]:
    for entry in schema.get("x-kubernetes-validations", ()):
        if not _holds(entry, value):
            yield place, entry.get("message", entry["rule"])
    for child, inner, where in _below(schema, value, place):
        yield from _broken_rules(child, inner, where)


def _lower_ascii(text: celpy.celtypes.StringType) -> celpy.celtypes.StringType:
    """Kubernetes' own extension of CEL."""
    return celpy.celtypes.StringType(text.lower())


@functools.cache
def compile_rule(rule: str) -> celpy.Runner:
    environment = celpy.Environment()
    return environment.program(environment.compile(rule), functions={"lowerAscii": _lower_ascii})


def _holds(entry: dict[str, Any], value: Any) -> bool:
    rule = entry["rule"]
    if "oldSelf" in rule:
        if not entry.get("optionalOldSelf"):
            return True  # about updates only
        rule = rule.replace("oldSelf.hasValue()", "false")  # a resource that is created has no predecessor
        assert "oldSelf" not in rule, rule
    return bool(compile_rule(rule).evaluate({"self": celpy.json_to_cel(value)}))
