"""`surgvqa-remote`: parses the command line, runs the command, answers."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from remote.cli import commands
from remote.cli.parser import build_parser, split_job
from surgvqa.cli.jobs import record_failure
from surgvqa.cli.main import forgive_encoding
from surgvqa.cli.parser import normalise
from surgvqa.config.workspace import Workspace, find_workspace, load_workspace
from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.outcome import Outcome
from surgvqa.runs.events import finite
from surgvqa.terminal.drawing import terminal

COMMANDS: dict[str, Callable[[argparse.Namespace, Workspace], Outcome]] = {
    "hosts": commands.hosts,
    "setup": commands.set_up,
    "upload": commands.upload,
    "launch": commands.launch,
    "resume": commands.resume,
    "runs": commands.runs,
    "follow": commands.follow,
    "stop": commands.stop,
    "fetch": commands.fetch,
    "gpus": commands.gpus,
}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 good, 1 it failed or the answer is bad, 2 it could not be asked."""
    argv = normalise(sys.argv[1:] if argv is None else argv)
    forgive_encoding()
    name = next((a for a in argv if not a.startswith("-")), "")
    try:
        argv, job = split_job(argv)
        arguments = build_parser().parse_args(argv)
        name = arguments.command
        if job:
            arguments.job = job
        root = arguments.workspace
        if root and not Path(root).is_dir():
            raise UsageError(f"--workspace {root}: no such folder")
        workspace = load_workspace(Path(root) if root else find_workspace())
        outcome = COMMANDS[name](arguments, workspace)
    except SurgvqaError as error:
        print(f"surgvqa-remote {name}".rstrip() + f": {error}", file=sys.stderr)
        record_failure(argv, error)
        return error.exit_code
    except KeyboardInterrupt:
        after = "run it again to go on from here" if name in ("setup", "upload", "fetch") else "the host's jobs go on"
        print(f"surgvqa-remote {name}: stopped; {after}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except OSError as error:  # a disk here that is full, a folder that cannot be written
        print(f"surgvqa-remote {name}: {error.filename or 'here'}: {error.strerror or error}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(finite(outcome.data), indent=1, default=str))
    elif outcome.show:
        outcome.show(terminal())
    return 0 if outcome.ok else 1
