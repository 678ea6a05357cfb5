"""The application: its commands, its exit codes, and that it starts fast."""

from __future__ import annotations

import importlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from dynamo_kvtc import __version__
from dynamo_kvtc.cli.app import COMMANDS, app
from dynamo_kvtc.errors import ConfigError

runner = CliRunner()


def test_help_lists_every_command() -> None:
    shown = runner.invoke(app, ["--help"])
    assert shown.exit_code == 0
    for name in COMMANDS:
        assert name in shown.stdout


def test_no_arguments_show_the_help() -> None:
    shown = runner.invoke(app, [])
    assert "validate-config" in shown.output


def test_version() -> None:
    shown = runner.invoke(app, ["--version"])
    assert (shown.exit_code, shown.stdout.strip()) == (0, f"dynamo-kvtc {__version__}")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_json(name: str) -> None:
    shown = runner.invoke(app, [name, "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    assert "--json" in shown.stdout


@pytest.mark.parametrize(
    "arguments",
    [["shcema"], ["schema", "--no-such-option"], ["validate-config"], ["--log-level", "loud", "schema"]],
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    assert runner.invoke(app, arguments).exit_code == 2


def fails() -> None:
    """Fail on purpose."""
    raise ConfigError("tiers: [0] is\n  missing; add it")


def test_an_expected_error_is_one_paragraph_and_exit_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    # A command that fails stands in for a real one: what is tested is how the application reports it.
    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(command=fails))
    shown = runner.invoke(app, ["schema"])
    assert shown.exit_code == 1
    assert shown.stdout == ""
    assert shown.stderr == "error: tiers: [0] is missing; add it\n"


@pytest.mark.parametrize("arguments", [["--help"], ["schema"], ["doctor", "--help"]])
def test_what_needs_no_tensors_does_not_import_torch(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from dynamo_kvtc.cli import main\n"
        f"sys.argv[1:] = {arguments!r}\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
