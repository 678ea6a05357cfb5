"""What every command prints with: results to standard output, progress and errors to standard error."""

from __future__ import annotations

import json as json_module
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from dynamo_kvtc.errors import KvtcError

__all__ = [
    "JsonFlag",
    "format_bytes",
    "format_rate",
    "format_seconds",
    "make_table",
    "print_error",
    "print_json",
    "print_line",
    "print_note",
    "print_table",
    "progress",
    "stderr",
]

#: The ``--json`` option that every command takes.
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON to standard output instead of tables.")]

#: Columns of a table that does not go to a terminal; rich would otherwise fold it at 80.
_PIPED_WIDTH = 160

#: The console for progress, notes and errors; it follows ``sys.stderr``.
stderr = Console(stderr=True)


def make_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]] = ()) -> Table:
    """Build a table whose first column is a label and whose other columns are aligned right.

    Cells are shown by `str` as they are; square brackets are not markup.
    """
    table = Table(title=escape(title), title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(escape(column), justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row))
    return table


def print_table(table: Table) -> None:
    """Print a table to standard output."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_PIPED_WIDTH)
    console.print(table)


def print_json(value: Mapping[str, Any] | Sequence[Any]) -> None:
    """Print a value as indented JSON to standard output, and nothing else with it."""
    typer.echo(json_module.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def print_line(text: str) -> None:
    """Print one line of a result to standard output, as it is."""
    typer.echo(text)


def print_note(text: str) -> None:
    """Print one line for the person at the terminal to standard error."""
    stderr.print(escape(text), soft_wrap=True, highlight=False)


def print_error(error: KvtcError) -> None:
    """Print an error as one paragraph to standard error."""
    stderr.print(
        f"[bold red]error:[/] {escape(' '.join(str(error).split()))}", soft_wrap=True, highlight=False
    )


def progress() -> Progress:
    """Return a progress display on standard error: what, bar, per cent, elapsed, time left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=stderr,
    )


def format_bytes(nbytes: float) -> str:
    """Format a size in binary units: ``1536`` is ``1.5 KiB``."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"


def format_rate(bytes_per_s: float) -> str:
    """Format a rate in decimal units, as links and disks are sold: ``1.5e9`` is ``1.50 GB/s``."""
    if abs(bytes_per_s) < 1e9:
        return f"{bytes_per_s / 1e6:.1f} MB/s"
    return f"{bytes_per_s / 1e9:.2f} GB/s"


def format_seconds(seconds: float) -> str:
    """Format a duration with the unit that keeps it readable: ``0.0042`` is ``4.2 ms``."""
    if abs(seconds) < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    if abs(seconds) < 1:
        return f"{seconds * 1e3:.1f} ms"
    if abs(seconds) < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"
