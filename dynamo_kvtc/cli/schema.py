"""``dynamo-kvtc schema``: the JSON schema of the configuration file."""

from __future__ import annotations

from typing import Annotated

import typer

from dynamo_kvtc.cli.output import print_json
from dynamo_kvtc.config import json_schema

__all__ = ["command"]


def command(
    json: Annotated[bool, typer.Option("--json", help="The schema is JSON in any case.")] = True,
) -> None:
    """Print the JSON schema of the configuration file, for editors and validators."""
    print_json(json_schema())
