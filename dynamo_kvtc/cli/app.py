"""The typer application. It loads a command's module only when that command runs.

A command is one module of this package, named as the command with underscores
(``validate-config`` is ``validate_config.py``), that exposes one typed function `command`::

    from typing import Annotated

    import typer

    from dynamo_kvtc.cli.output import JsonFlag, print_json, print_table


    def command(
        folder: Annotated[Path, typer.Argument(help="What the argument is.", exists=True)],
        tokens: Annotated[int, typer.Option(help="What the option sets.", min=1)] = 24_000,
        json: JsonFlag = False,
    ) -> None:
        \"\"\"One line that says what the command does; shown by ``dynamo-kvtc COMMAND --help``.\"\"\"

A command that has further ones below it exposes a typer application `group` instead.

Progress goes to standard error, results to standard output. A command raises `KvtcError` subclasses
for everything that a user can mend; they become one paragraph on standard error and exit code 1.
It raises ``typer.Exit(1)`` when it did its work and the answer is bad (damage found), and
``typer.BadParameter`` (exit code 2) for arguments that contradict each other.
"""

from __future__ import annotations

import importlib
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from dynamo_kvtc import __version__
from dynamo_kvtc.errors import KvtcError

__all__ = ["COMMANDS", "app"]

#: Every command with the line that ``dynamo-kvtc --help`` shows.
COMMANDS: dict[str, str] = {
    "demo": "Run the whole way on a small real model and show what it saves.",
    "calibrate": "Fit an artifact to a model: bases, bit plans, expected errors.",
    "publish": "Put an artifact into a store of artifacts, under its id.",
    "evaluate": "Measure ratio and quality of an artifact on held-out text.",
    "inspect": "Show and verify an artifact, a stored object or a disk tier's folder.",
    "bench": "Measure encode, decode, transfers and lookups on this machine; `bench gpu`: the GPU codec.",
    "status": "Show what a running worker has done since its start.",
    "top": "Show what a running worker is doing now, until it is interrupted.",
    "explain": "Show what the policy does with a prefix of so many tokens, and why.",
    "validate-config": "Check configuration files and report every problem.",
    "plan": "Size tiers, memory and volumes for a model; print values for the Helm chart.",
    "doctor": "Check what works on this machine and say what to do about the rest.",
    "schema": "Print the JSON schema of the configuration file.",
}


def _load(name: str) -> Any:
    """Import a command's module and build its click command."""
    module = importlib.import_module(f"dynamo_kvtc.cli.{name.replace('-', '_')}")
    if hasattr(module, "group"):
        return typer.main.get_command(module.group)
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    single.command(name)(module.command)
    return typer.main.get_command(single)


class _LazyGroup(TyperGroup):
    """Lists every command from `COMMANDS`; imports a command's module only to run it."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        for name, summary in COMMANDS.items():
            self.add_command(TyperCommand(name, help=summary))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, _, rest = super().resolve_command(ctx, args)
        return name, _load(name) if name else None, rest

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KvtcError as error:
            from dynamo_kvtc.cli.output import print_error

            print_error(error)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_LazyGroup,
    name="dynamo-kvtc",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dynamo-kvtc {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", help="Show the version and exit.", is_eager=True, callback=_show_version
    ),
    log_level: str = typer.Option(
        "warning", "--log-level", help="debug, info, warning or error; logs go to standard error."
    ),
) -> None:
    """A compressed tier for the KV cache of LLM clusters that run NVIDIA Dynamo."""
    from dynamo_kvtc.observability import LOG_LEVELS, configure_logging

    if log_level not in LOG_LEVELS:
        raise typer.BadParameter(
            f"{log_level!r} is not one of {', '.join(LOG_LEVELS)}", param_hint="--log-level"
        )
    configure_logging(log_level)
