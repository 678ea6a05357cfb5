"""The shipped files: examples load, the schema is current and agrees with the code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import BaseModel

from dynamo_kvtc.config import json_schema, load_config

CONFIGS = Path(__file__).parents[2] / "configs"
EXAMPLES = sorted(CONFIGS.glob("*.yaml"))


def test_there_are_examples() -> None:
    assert {path.stem for path in EXAMPLES} >= {"default", "host-only", "host-and-disk"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_load_and_fit_the_schema(path: Path) -> None:
    assert load_config(path, {}).tiers
    jsonschema.validate(yaml.safe_load(path.read_text()), json_schema())


def test_default_yaml_names_every_key_with_its_default() -> None:
    written = yaml.safe_load((CONFIGS / "default.yaml").read_text())
    config = load_config(CONFIGS / "default.yaml", {})

    def check(model: BaseModel, values: dict[str, Any]) -> None:
        fields = type(model).model_fields
        assert set(values) == set(fields)
        for name, field in fields.items():
            value = getattr(model, name)
            if isinstance(value, BaseModel):
                check(value, values[name])
            elif isinstance(value, list):
                for item, item_values in zip(value, values[name], strict=True):
                    check(item, item_values)
            elif not field.is_required() and name != "artifact":
                assert value == field.default, name

    check(config, written)


def test_schema_json_is_current() -> None:
    shipped = json.loads((CONFIGS / "schema.json").read_text())
    assert shipped == json_schema(), "run `make schema`"


def test_every_key_is_described() -> None:
    schema = json_schema()
    for part in (schema, *schema["$defs"].values()):
        for name, field in part["properties"].items():
            assert field.get("description"), name


def test_the_schema_refuses_what_the_code_refuses() -> None:
    good = yaml.safe_load((CONFIGS / "default.yaml").read_text())
    validator = jsonschema.Draft202012Validator(json_schema())
    for path, value in [
        (("policy", "recent_windw"), 1),
        (("transfer", "timeout"), 5),
        (("transfer", "timeout"), "5 years"),
        (("codec", "profile"), "zip"),
        (("codec", "sink_bits"), 9),
    ]:
        section, key = path
        bad = {**good, section: {**good[section], key: value}}
        assert not validator.is_valid(bad), path
    assert not validator.is_valid({**good, "tiers": []})


def test_the_defaults_in_the_schema_fit_the_schema() -> None:
    schema = json_schema()
    for part in (schema, *schema["$defs"].values()):
        for name, field in part["properties"].items():
            if "default" in field:
                jsonschema.validate(field["default"], {**field, "$defs": schema["$defs"]})
                assert name


def test_the_documentation_lists_every_key_with_its_default() -> None:
    text = (CONFIGS.parent / "docs" / "configuration.md").read_text()
    schema = json_schema()
    for part in (schema, *schema["$defs"].values()):
        for name, field in part["properties"].items():
            if "$ref" in field:
                assert f"### {name}" in text
                continue
            row = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
            default = field.get("default")
            if isinstance(default, str) and default:
                assert f"`{default}`" in row
            elif default is not None:
                assert str(default).lower().removesuffix(".0") in row
