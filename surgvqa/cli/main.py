"""`surgvqa`: parses the command line, resolves the settings and calls the module of the command.

Nothing heavy is imported here. A command's module has `run(options, run) -> Outcome` and may have `check(options)`,
which validates the input before a run folder is made. Jobs (merge, train, evaluate, …) get a run folder; the others get
None.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import sys
import tempfile
import traceback
from functools import partial
from pathlib import Path

from surgvqa.cli.commands import COMMANDS
from surgvqa.cli.jobs import new_run, record_failure, run_job
from surgvqa.cli.parser import build_parser, extra_options, normalise, take_debug
from surgvqa.config import options, resolve, settings
from surgvqa.config.workspace import Workspace, find_workspace, load_workspace
from surgvqa.errors import SurgvqaError, UsageError, unexpected, unimportable
from surgvqa.machine import packages
from surgvqa.memory import allocator
from surgvqa.outcome import Outcome
from surgvqa.runs.events import finite
from surgvqa.runs.launch import launch
from surgvqa.terminal.drawing import terminal
from surgvqa.untrusted import one_line


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 success, 1 failure or a bad result, 2 wrong usage or unusable input."""
    argv = normalise(sys.argv[1:] if argv is None else argv)
    forgive_encoding()
    debug, argv = take_debug(argv)
    name = next((a for a in argv if not a.startswith("-")), "")
    try:
        arguments, unknown = build_parser().parse_known_args(argv)
        name = arguments.command
        outcome = dispatch(name, arguments, extra_options(name, unknown), argv)
        answer(outcome, arguments.json)
    except KeyboardInterrupt:
        say(f"surgvqa {name}: stopped")
        return 1
    except BrokenPipeError:  # `surgvqa runs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and not unimportable(error):  # argparse's, after --help or bad usage
            raise
        return failed(f"surgvqa {name}".rstrip(), argv, error, debug)
    return 0 if outcome.ok else 1


def say(line: str) -> None:
    """Prints one printable line on stderr, even if `line` comes from a file name or a host's answer."""
    print(one_line(line), file=sys.stderr)


def failed(program: str, argv: list[str], error: BaseException, debug: bool) -> int:
    """Prints any error of both programs as one line, with a traceback under --debug. Returns the exit code.

    A launched job that fails before it has begun records the error in the run folder that was made for it.
    """
    if debug:
        traceback.print_exception(error)
    if isinstance(error, SurgvqaError):
        known = error
    elif isinstance(error, OSError) and error.strerror:  # a full disk, a folder that is gone
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
        known = SurgvqaError(where + error.strerror)
    else:
        hint = "" if debug or unimportable(error) else " (--debug shows where; please report it)"
        known = SurgvqaError(unexpected(error) + hint)
    say(f"{program}: {known}")
    record_failure(argv, known)
    return known.exit_code


def forgive_encoding() -> None:
    """Makes stdout and stderr write "?" for characters that the locale cannot encode (bars in Latin-1)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def answer(outcome: Outcome, as_json: bool) -> None:
    """Prints the command's outcome on stdout."""
    if as_json:
        print(json.dumps(finite(outcome.data), indent=1, default=str), flush=True)
    elif outcome.show:
        outcome.show(terminal())


def dispatch(name: str, arguments: argparse.Namespace, extra: dict[str, str], argv: list[str]) -> Outcome:
    """Resolves the options and runs the command's module."""
    from surgvqa.cli import (
        ranks,
    )  # imported late: it queries GPUs, which surgvqa-remote, a user of this module, never does

    command = COMMANDS[name]
    ranks.require_one(name)
    ranks.see_own_card()
    given_root = arguments.workspace
    if given_root and not Path(given_root).is_dir():
        raise UsageError(f"--workspace {given_root}: no such folder")
    workspace = load_workspace(Path(given_root) if given_root else find_workspace())
    only_scores = name == "evaluate" and bool(
        getattr(arguments, "predictions", None) or workspace.value("predictions", name)
    )
    if command.needs_train and not only_scores:
        packages.require_installed(name, packages.TRAIN, "train")
        allocator.grow_segments()
    elif command.needs_torch:
        packages.require_installed(name, packages.TORCH, "merge")
    if name == "train" and ranks.is_other():
        raise SystemExit(ranks.other_rank(command.room, arguments, argv, workspace))
    module, _, function = command.room.partition(":")
    if name not in options.COMMAND_OPTIONS:
        answered: Outcome = getattr(importlib.import_module(module), function or "run")(arguments, workspace)
        return answered

    known = settings.settings_of(options.COMMAND_OPTIONS[name])
    given = {
        key: settings.convert(known[key], value, "command line")
        for key, value in vars(arguments).items()
        if key in known
    }
    from surgvqa.evaluation import resume  # imported late, because they load much
    from surgvqa.training import results

    resumed = name == "evaluate" and given.get("resume")
    own = getattr(arguments, "run_id", None)
    inherited = resume.inherit(given, workspace, own) if resumed else results.inherit(name, given, workspace, own)
    resolved = resolve.resolve(name, given, workspace, getattr(arguments, "preset", None), extra, inherited)
    settings.require_bounds(resolved.options, resolved.sources)
    room = importlib.import_module(module)
    count = ranks.of_training(resolved.options, arguments, argv, workspace) if name == "train" else 1
    starts_a_job = command.job and arguments.detach and not getattr(resolved.options, "dry_run", False)
    if starts_a_job and hasattr(room, "check_before_launch"):
        room.check_before_launch(resolved.options)
    elif hasattr(room, "check"):
        room.check(resolved.options)
    if not command.job:
        answered = room.run(resolved.options, workspace)
        return answered
    if only_scores or getattr(resolved.options, "dry_run", False):  # leaves no run folder
        with tempfile.TemporaryDirectory() as folder:
            run = new_run(name, resolved, Workspace(Path(folder), {}, {}), argv=argv)
            answered = run_job(run, partial(room.run, resolved.options))
        answered.data.pop("run")  # it is gone
        return answered
    if arguments.detach:
        rest = [a for a in argv[argv.index(name) + 1 :] if a not in ("--detach", "--json")]
        started = launch(name, rest, Path.cwd(), workspace.runs_dir)
        return Outcome({"run": started.name, "folder": str(started)}, show=lambda console: console.print(started.name))
    run = new_run(name, resolved, workspace, arguments.run_id, argv)
    work = partial(room.run, resolved.options)
    return run_job(run, ranks.together(work, resolved.options) if count > 1 else work)
