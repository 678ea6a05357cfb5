"""``dynamo-kvtc validate-config``: every problem of configuration files at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dynamo_kvtc.cli.key_files import exposed_key_files
from dynamo_kvtc.cli.output import JsonFlag, print_json, print_line
from dynamo_kvtc.config import check_config

__all__ = ["command"]


def command(
    files: Annotated[list[Path], typer.Argument(help="Configuration files (YAML).", metavar="FILE...")],
    environment: Annotated[
        bool, typer.Option(help="Apply DYNAMO_KVTC__… variables, as a serving process would.")
    ] = True,
    json: JsonFlag = False,
) -> None:
    """Check configuration files: keys, types, units, bounds, contradictions.

    Only the files themselves are read: artifact and tier folders may lie on another machine. Key files that
    are on this one are warned of if others have access to them. Exits with 1 if any file has a problem.
    """
    report = []
    for path in files:
        config, problems = check_config(path) if environment else check_config(path, {})
        warnings = [] if config is None else [str(exposed) for exposed in exposed_key_files(config)]
        report.append(
            {
                "file": str(path),
                "valid": config is not None,
                "warnings": warnings,
                "problems": [
                    {"where": problem.where, "source": problem.source, "message": problem.message}
                    for problem in problems
                ],
            }
        )
        if not json:
            for problem in problems:
                print_line(f"{path}: {problem}")
            for warning in warnings:
                print_line(f"{path}: warning: {warning}")
            if config is not None:
                print_line(f"{path}: valid")
    if json:
        print_json(report)
    if not all(entry["valid"] for entry in report):
        raise typer.Exit(1)
