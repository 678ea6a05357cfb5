"""The command line: one module per command, and nothing that another room would need.

Owns: arguments, tables, progress bars, exit codes. Does not own: any logic; a command calls one or
two functions of another room and shows what they return.
"""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Run ``dynamo-kvtc`` with the process's arguments; the console entry point.

    Exit codes: 0 done, 1 failed (a `KvtcError` was reported), 2 wrong usage.
    """
    from dynamo_kvtc.cli.app import app

    app()
