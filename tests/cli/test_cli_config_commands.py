"""schema and validate-config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dynamo_kvtc.cli.app import app
from dynamo_kvtc.config import json_schema

CONFIGS = Path(__file__).parents[2] / "configs"
BAD = "artefact: x\ntiers:\n  - kind: host\n    capacity: lots\n"

runner = CliRunner()


def test_schema_prints_the_schema() -> None:
    shown = runner.invoke(app, ["schema"])
    assert shown.exit_code == 0
    assert json.loads(shown.stdout) == json_schema()


def test_the_shipped_examples_are_valid() -> None:
    files = sorted(str(path) for path in CONFIGS.glob("*.yaml"))
    shown = runner.invoke(app, ["validate-config", *files])
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.count(": valid") == len(files)


def test_every_problem_of_every_file_is_reported(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(BAD)
    good = CONFIGS / "host-only.yaml"
    shown = runner.invoke(app, ["validate-config", str(bad), str(tmp_path / "absent.yaml"), str(good)])
    assert shown.exit_code == 1
    assert "artefact (line 1): unknown key; did you mean artifact?" in shown.stdout
    assert "tiers[0].capacity (line 4): 'lots' is not a size" in shown.stdout
    assert "absent.yaml: cannot be read" in shown.stdout
    assert f"{good}: valid" in shown.stdout


def test_json_holds_the_same(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(BAD)
    shown = runner.invoke(app, ["validate-config", "--json", str(bad), str(CONFIGS / "default.yaml")])
    assert shown.exit_code == 1
    first, second = json.loads(shown.stdout)
    assert not first["valid"] and second["valid"]
    assert [problem["where"] for problem in first["problems"]] == ["tiers[0].capacity", "artefact"]


@pytest.mark.parametrize(("flag", "code"), [("--environment", 1), ("--no-environment", 0)])
def test_the_environment_can_be_left_out(flag: str, code: int) -> None:
    env = {"DYNAMO_KVTC__CODEC__RATIO": "lots"}
    shown = runner.invoke(app, ["validate-config", flag, str(CONFIGS / "default.yaml")], env=env)
    assert shown.exit_code == code


def test_key_files_that_others_have_access_to_are_warned_of(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(bytes(32))
    path = tmp_path / "config.yaml"
    path.write_text(
        "codec: {profile: raw}\n"
        "tiers:\n  - kind: host\n    capacity: 1GiB\n"
        "    encryption: {keys: [{id: a, file: key}, {id: b, file: gone}]}\n"
    )
    for mode, expected in ((0o600, ""), (0o644, "may read it"), (0o622, "refuses to start")):
        key.chmod(mode)
        shown = runner.invoke(app, ["validate-config", str(path)])
        assert shown.exit_code == 0 and f"{path}: valid" in shown.stdout
        assert expected in shown.stdout and ("warning" in shown.stdout) is bool(expected)
    (report,) = json.loads(runner.invoke(app, ["validate-config", "--json", str(path)]).stdout)
    assert len(report["warnings"]) == 1 and str(key) in report["warnings"][0]
