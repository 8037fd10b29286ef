"""The entry point of `surgvqa-remote`. Opens an upload's connection, the slowest step, before loading the program."""

from __future__ import annotations

import sys


def main() -> int:
    """Runs remote.cli.main.main with this process's arguments and returns its exit code."""
    if sys.argv[1:2] == ["upload"]:
        from remote.upload import ahead

        ahead.start(sys.argv[2:])
    from remote.cli.main import main as run

    return run()
