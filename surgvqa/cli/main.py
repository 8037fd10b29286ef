"""`surgvqa`: parses, lays the settings over each other, and hands each command to the room that does it.

Nothing heavy is imported here. A command's room has `run(options, run) -> Outcome`, and may have `check(options)`,
which looks at the input before a run folder is made. Jobs (merge, train, evaluate, …) get a run folder; the others get
None.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import io
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgvqa import __version__
from surgvqa.config import options
from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.memory import allocator
from surgvqa.outcome import Outcome
from surgvqa.runs.folder import Run, finished_event, finite, launch
from surgvqa.terminal.job_view import JobView, OutputToLog, terminal
from surgvqa.training import results

TRAIN_PACKAGES = ("torch", "transformers", "peft", "librosa")


@dataclass(frozen=True)
class Command:
    """One row of the command table."""

    help: str
    example: str
    room: str
    """The module whose run() does it."""
    job: bool = False
    """Whether it has a run folder."""
    needs_train: bool = False
    """Whether it needs what pip install 'surgvqa[train]' brings."""
    positional: tuple[str, ...] = ()
    extras: bool = False
    """Whether unknown options are passed on (TrainingArguments)."""
    arguments: Callable[[argparse.ArgumentParser], None] | None = field(default=None)
    """For commands without an options dataclass."""


def _run_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_name",
        metavar="RUN",
        nargs="?",
        default="last",
        help="run id, the beginning of one, a run name or folder (default: the newest)",
    )


def _gpus_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="again every SECONDS until Ctrl-C")


COMMANDS: dict[str, Command] = {
    "demo": Command(
        "make the embedded workspace: small model, small data, all real formats",
        "surgvqa demo demo --run",
        "surgvqa.demo",
        needs_train=True,
        positional=("directory",),
    ),
    "merge": Command(
        "LoRA adapters + checkpoint -> one full BF16 checkpoint",
        "surgvqa merge --stage1_model_path stage1 --stage2_adapter_path stage2 --output_path merged",
        "surgvqa.merge.command",
        needs_train=True,
        job=True,
    ),
    "audit": Command(
        "dtypes, shapes and completeness of a checkpoint, from the headers alone",
        "surgvqa audit merged",
        "surgvqa.checkpoint.audit",
        positional=("checkpoint",),
    ),
    "check-data": Command(
        "every line of the JSONL files against the frames and the audio",
        "surgvqa check-data train.jsonl eval.jsonl --frames_dir frames --audio_dir audio",
        "surgvqa.data.check",
        positional=("files",),
    ),
    "budget": Command(
        "the memory table of a configuration, a row a component",
        "surgvqa budget --preset oom-6f-512px",
        "surgvqa.memory.budget",
    ),
    "train": Command(
        "LoRA training in BF16, inside the budget",
        "surgvqa train --model_name_or_path merged --train_data_path train.jsonl --frames_dir frames --audio_dir audio",
        "surgvqa.training.command",
        needs_train=True,
        job=True,
        extras=True,
    ),
    "evaluate": Command(
        "greedy answers to every sample, scored by question type",
        "surgvqa evaluate --checkpoint last --eval_data_path eval.jsonl --frames_dir frames --audio_dir audio",
        "surgvqa.evaluation.command",
        needs_train=True,
        job=True,
    ),
    "ask": Command(
        "one answer to one spoken question",
        "surgvqa ask --checkpoint merged --frames f1.jpg f2.jpg --audio question.wav",
        "surgvqa.evaluation.ask",
        needs_train=True,
    ),
    "presets": Command("the presets with their predicted peaks", "surgvqa presets", "surgvqa.runs.commands:presets"),
    "runs": Command("the runs of this workspace", "surgvqa runs", "surgvqa.runs.commands:runs"),
    "follow": Command(
        "watch a run until it ends", "surgvqa follow last", "surgvqa.runs.commands:follow", arguments=_run_argument
    ),
    "stop": Command(
        "end a run: checkpoint, then a clean end",
        "surgvqa stop last",
        "surgvqa.runs.commands:stop",
        arguments=_run_argument,
    ),
    "gpus": Command(
        "memory, utilisation, power and processes of the GPUs",
        "surgvqa gpus --watch 1",
        "surgvqa.machine.gpu",
        arguments=_gpus_arguments,
    ),
    "doctor": Command(
        "what this machine can do, and how to mend what it can't", "surgvqa doctor", "surgvqa.machine.doctor"
    ),
}


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and exit code 2."""

    def error(self, message: str):
        raise UsageError(message)


def build_parser() -> Parser:
    """The whole command line. Options stay absent unless they were named, so that the sources can be told apart."""
    parser = Parser(
        prog="surgvqa",
        description="Fine-tune a spoken-question surgical video QA model in BF16, inside a GPU memory budget.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"surgvqa {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=command.help,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
            description=command.help[0].upper() + command.help[1:] + ".",
            epilog=f"example: {command.example}",
        )
        sub.add_argument("--json", action="store_true", default=False, help="one JSON document on stdout")
        sub.add_argument(
            "--workspace",
            default=None,
            metavar="DIR",
            help="workspace folder (default: the nearest one with a surgvqa.toml, else here)",
        )
        if command.arguments:
            command.arguments(sub)
        options_class = options.COMMAND_OPTIONS.get(name)
        if options_class is None:
            continue
        if issubclass(options_class, options.DataOptions):
            sub.add_argument("--preset", default=None, metavar="NAME", help="named overrides (surgvqa presets)")
        if command.job:
            sub.add_argument(
                "--detach",
                action="store_true",
                default=False,
                help="start as a job of its own, print its run id and return",
            )
            sub.add_argument("--run_id", default=None, help=argparse.SUPPRESS)
        for setting in options.settings_of(options_class).values():
            add_option(sub, setting, positional=setting.name in command.positional)
    return parser


def add_option(parser: argparse.ArgumentParser, setting: options.Setting, positional: bool) -> None:
    """One setting as an argument of a command."""
    default = "" if setting.required or setting.default in (None, "") else f" (default: {setting.default})"
    arguments: dict[str, Any] = {"help": (setting.help + default).replace("%", "%%")}
    if setting.metavar or not setting.choices:
        arguments["metavar"] = setting.metavar or setting.type.__name__.strip("_").upper()
    elif setting.choices:
        arguments["metavar"] = "{" + ",".join(setting.choices) + "}"
    if setting.repeated:
        arguments["nargs"] = "+"
    if positional:
        if not setting.repeated and not setting.required:
            arguments["nargs"] = "?"
        parser.add_argument(setting.name, **arguments)
    elif setting.type is bool:
        parser.add_argument(f"--{setting.name}", nargs="?", const="true", **arguments)
    else:
        parser.add_argument(f"--{setting.name}", **arguments)


def normalise(argv: list[str]) -> list[str]:
    """`--learning-rate` is `--learning_rate`: option names are accepted with - or _."""
    end = argv.index("--") if "--" in argv else len(argv)

    def spell(token: str) -> str:
        if not token.startswith("--"):
            return token
        name, equals, value = token.partition("=")
        return "--" + name[2:].replace("-", "_") + equals + value

    return [spell(t) for t in argv[:end]] + argv[end:]


def extra_options(command: str, unknown: list[str]) -> dict[str, str]:
    """Options that are not ours, as {name: text}; UsageError for anything that is no option at all."""
    known = options.settings_of(options.COMMAND_OPTIONS[command]) if command in options.COMMAND_OPTIONS else {}
    extra: dict[str, str] = {}
    rest = list(unknown)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--"):
            raise UsageError(f"unexpected argument {token!r}")
        name, equals, value = token[2:].partition("=")
        if not COMMANDS[command].extras:
            raise UsageError(f"unknown option --{name}{options.nearest(name, known)}")
        extra[name] = value if equals else (rest.pop(0) if rest and not rest[0].startswith("--") else "true")
    return extra


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 good, 1 the answer is bad or it failed, 2 it could not be asked."""
    argv = normalise(sys.argv[1:] if argv is None else argv)
    forgive_encoding()
    name = next((a for a in argv if not a.startswith("-")), "")
    try:
        arguments, unknown = build_parser().parse_known_args(argv)
        name = arguments.command
        outcome = dispatch(name, arguments, extra_options(name, unknown), argv)
        answer(outcome, arguments.json)
    except SurgvqaError as error:
        print(f"surgvqa {name}".rstrip() + f": {error}", file=sys.stderr)
        record_failure(argv, error)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"surgvqa {name}: stopped", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `surgvqa runs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except OSError as error:  # a folder that cannot be read, or is gone
        where = f"{error.filename}: " if error.filename else ""
        print(f"surgvqa {name}: {where}{error.strerror or error}", file=sys.stderr)
        return 1
    return 0 if outcome.ok else 1


def forgive_encoding() -> None:
    """What the locale cannot show (bars in Latin-1) becomes "?" instead of an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def answer(outcome: Outcome, as_json: bool) -> None:
    """What the command found, on stdout."""
    if as_json:
        print(json.dumps(finite(outcome.data), indent=1, default=str), flush=True)
    elif outcome.show:
        outcome.show(terminal())


def record_failure(argv: list[str], error: SurgvqaError) -> None:
    """A launched job that could not even be asked says so in the run folder that was made for it."""

    def value(option: str) -> str | None:
        """The last one counts, as for argparse."""
        found = None
        for word, after in zip(argv, [*argv[1:], None]):
            name, equals, text = word.partition("=")
            if name == option:
                found = text if equals else after
        return found

    run_id = value("--run_id")
    if not run_id:
        return
    folder = Path(value("--workspace") or options.find_workspace()) / "runs" / run_id
    if folder.is_dir() and finished_event(folder) is None:
        with suppress(SurgvqaError), Run(folder):
            raise error


def dispatch(name: str, arguments: argparse.Namespace, extra: dict[str, str], argv: list[str]) -> Outcome:
    """Resolves the options and runs the command's room."""
    command = COMMANDS[name]
    if command.needs_train:
        missing = [package for package in TRAIN_PACKAGES if importlib.util.find_spec(package) is None]
        if missing:
            raise SurgvqaError(f"{', '.join(missing)} not installed here; {name} needs: pip install 'surgvqa[train]'")
        allocator.grow_segments()
    given_root = arguments.workspace
    if given_root and not Path(given_root).is_dir():
        raise UsageError(f"--workspace {given_root}: no such folder")
    workspace = options.load_workspace(Path(given_root) if given_root else options.find_workspace())
    module, _, function = command.room.partition(":")
    if name not in options.COMMAND_OPTIONS:
        return getattr(importlib.import_module(module), function or "run")(arguments, workspace)

    known = options.settings_of(options.COMMAND_OPTIONS[name])
    given = {
        key: options.convert(known[key], value, "command line")
        for key, value in vars(arguments).items()
        if key in known
    }
    inherited = results.inherit(name, given, workspace)
    resolved = options.resolve(name, given, workspace, getattr(arguments, "preset", None), extra, inherited)
    if resolved.extra:
        resolved.options.extra = resolved.extra
    room = importlib.import_module(module)
    if hasattr(room, "check"):
        room.check(resolved.options)
    if not command.job:
        return room.run(resolved.options, workspace)
    if getattr(resolved.options, "dry_run", False):  # only a question: it leaves no run folder
        with tempfile.TemporaryDirectory() as folder:
            return run_job(name, room.run, resolved, options.Workspace(Path(folder), {}, {}), argv=argv)
    if arguments.detach:
        rest = [a for a in argv[argv.index(name) + 1 :] if a not in ("--detach", "--json")]
        folder = launch(name, rest, Path.cwd(), workspace.runs_dir)
        return Outcome({"run": folder.name, "folder": str(folder)}, show=lambda console: console.print(folder.name))
    return run_job(name, room.run, resolved, workspace, arguments.run_id, argv)


def run_job(
    name: str,
    room: Callable[..., Outcome],
    resolved: options.Resolved,
    workspace: options.Workspace,
    run_id: str | None = None,
    argv: list[str] | None = None,
) -> Outcome:
    """Runs one job with its run folder; in the foreground its events are drawn on the terminal.

    SIGTERM is met as Ctrl-C is: the job ends cleanly and says "stopped".
    """

    def terminate(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, terminate)
    detached = os.environ.get("SURGVQA_DETACHED") == "1"
    run = Run.create(
        workspace.runs_dir, name, run_id=run_id, options=resolved.record(), preset=resolved.preset, argv=argv
    )
    try:
        with nullcontext() if detached else OutputToLog(run.folder / "log.txt") as output:
            view = JobView(getattr(output, "terminal", None))
            run.observer = None if detached else view.show
            try:
                with run:
                    try:
                        outcome = room(resolved.options, run)
                    except (SurgvqaError, KeyboardInterrupt):
                        raise
                    except Exception:
                        traceback.print_exc()  # into log.txt; the terminal gets one line
                        raise
                    run.result = {**outcome.data, **run.result}
                    run.exit_code = 0 if outcome.ok else 1
            finally:
                view.close()
    except (SurgvqaError, KeyboardInterrupt):
        raise
    except Exception as error:
        raise SurgvqaError(f"{type(error).__name__}: {error} (details: {run.folder / 'log.txt'})") from error
    finally:
        signal.signal(signal.SIGTERM, previous)
    outcome.data = {"run": run.id, **outcome.data}
    return outcome
