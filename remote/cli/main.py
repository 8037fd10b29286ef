"""`surgvqa-remote`: parses the command line, runs the command, answers."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from remote.cli import cloud, commands
from remote.cli.parser import build_parser, split_job
from surgvqa.cli.main import answer, failed, forgive_encoding, say
from surgvqa.cli.parser import normalise, take_debug
from surgvqa.config.workspace import Workspace, find_workspace, load_workspace
from surgvqa.errors import UsageError
from surgvqa.outcome import Outcome

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
    "offers": cloud.offers,
    "rented": cloud.rented,
}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 good, 1 it failed or the answer is bad, 2 it could not be asked."""
    argv = normalise(sys.argv[1:] if argv is None else argv)
    forgive_encoding()
    debug, argv = take_debug(argv)
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
        answer(outcome, arguments.json)
    except KeyboardInterrupt:
        after = "run it again to go on from here" if name in ("setup", "upload", "fetch") else "the host's jobs go on"
        say(f"surgvqa-remote {name}: stopped; {after}")
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except Exception as error:
        return failed(f"surgvqa-remote {name}".rstrip(), argv, error, debug)
    return 0 if outcome.ok else 1
