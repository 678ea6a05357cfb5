"""``dynamo-kvtc publish``: put an artifact into a store, under its id and under aliases."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dynamo_kvtc.cli.output import JsonFlag, print_json, print_line

__all__ = ["command"]


def command(
    artifact: Annotated[Path, typer.Argument(help="Folder that `calibrate` wrote.")],
    store: Annotated[Path, typer.Argument(help="Folder that holds artifacts side by side.", file_okay=False)],
    alias: Annotated[list[str] | None, typer.Option(help="Name that stands for it from now on.")] = None,
    json: JsonFlag = False,
) -> None:
    """Put an artifact into a store, whole or not at all, under its id; a second time changes nothing."""
    from dynamo_kvtc.calibration.publish import publish

    folder = publish(artifact, store, alias or ())
    if json:
        print_json({"id": folder.name, "folder": str(folder), "aliases": alias or []})
    else:
        print_line(str(folder))
