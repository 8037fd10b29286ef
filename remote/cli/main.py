"""`surgvqa-remote`: parses the command line, runs the command, answers."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from remote.cli.parser import build_parser, split_job
from surgvqa.cli.main import answer, failed, forgive_encoding, say
from surgvqa.cli.parser import normalise, take_debug
from surgvqa.config.workspace import Workspace, find_workspace, load_workspace
from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.outcome import Outcome

COMMANDS = {
    "hosts": "commands.hosts",
    "setup": "commands.set_up",
    "upload": "commands.upload",
    "launch": "commands.launch",
    "resume": "commands.resume",
    "runs": "commands.runs",
    "follow": "commands.follow",
    "stop": "commands.stop",
    "fetch": "commands.fetch",
    "gpus": "commands.gpus",
    "disk": "disk.disk",
    "offers": "cloud.offers",
    "rented": "cloud.rented",
    "rent": "rent.rent",
    "end": "rent.end",
    "export": "export.export",
}
"""The function of each command, in a module beside this one: only one of them is loaded."""


def _command(name: str) -> Callable[[argparse.Namespace, Workspace], Outcome]:
    module, function = COMMANDS[name].split(".")
    found: Callable[[argparse.Namespace, Workspace], Outcome] = getattr(
        importlib.import_module(f"remote.cli.{module}"), function
    )
    return found


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
        outcome = _command(name)(arguments, workspace)
        answer(outcome, arguments.json)
        say_money()
    except KeyboardInterrupt:
        goes_on = name in ("setup", "upload", "fetch", "rent", "launch", "end")
        after = "run it again to go on from here" if goes_on else "the host's jobs go on"
        say(f"surgvqa-remote {name}: stopped; {after}")
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except Exception as error:
        return failed(f"surgvqa-remote {name}".rstrip(), argv, error, debug)
    return 0 if outcome.ok else 1


def say_money() -> None:
    """One line for each machine that costs money now, by the ledger alone: no network, and nothing fails by it."""
    from remote.agent.protocol import IDLE_S
    from remote.cloud.ledger import Ledger
    from remote.cloud.plan import Plans
    from surgvqa.terminal.figures import human_seconds

    ledger, now = Ledger(), time.time()
    for wrong in ledger.damaged():
        say(f"surgvqa-remote: a record of a rented machine cannot be read, and it may cost money: {wrong}")
    for record in ledger.records():
        if record.open and record.price_per_hour > 0:
            price = f"${record.price_per_hour:.2f} an hour, ${record.cost(now):.2f} so far"
            how = "is rented"
            with contextlib.suppress(SurgvqaError, OSError):
                plan = Plans(ledger).of(record)
                if plan and (idle_s := plan.idle_s(now)) >= IDLE_S:
                    how = f"is rented and IDLE since its job ended ({human_seconds(idle_s)})"
            if record.end_asked:
                how = f"was to end at {time.strftime('%H:%M', time.localtime(record.end_asked))} and has NOT ENDED"
            say(f"surgvqa-remote: {record.name} {how}: {price}; its end: surgvqa-remote end {record.name}")
