"""Builds the command line from the table of commands and the options dataclasses."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from surgvqa import __version__
from surgvqa.cli.commands import COMMANDS
from surgvqa.cli.completion import add_completion
from surgvqa.config import options, settings
from surgvqa.errors import UsageError

TRAINING_DEBUG = ("underflow_overflow", "tpu_metrics_debug")
"""Values of transformers.TrainingArguments.debug."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def build_parser() -> Parser:
    """The parser of all commands. It leaves out options that were not given, so that their source can be determined."""
    parser = Parser(
        prog="surgvqa",
        description="Fine-tune a spoken-question surgical video QA model in BF16, inside a GPU memory budget.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"surgvqa {__version__}")
    add_completion(parser)
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
        if not command.extras:  # TrainingArguments has a --debug of its own: see `take_debug`
            sub.add_argument("--debug", action="store_true", default=False, help="show the traceback of an error")
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
        for setting in settings.settings_of(options_class).values():
            add_option(sub, setting, positional=setting.name in command.positional)
    return parser


def add_option(parser: argparse.ArgumentParser, setting: settings.Setting, positional: bool) -> None:
    """Adds a setting to a command's parser."""
    shown = " ".join(map(str, setting.default)) if isinstance(setting.default, tuple) else setting.default
    default = "" if setting.required or shown in (None, "") else f" (default: {shown})"
    arguments: dict[str, Any] = {"help": (setting.help + default).replace("%", "%%")}
    if setting.metavar or not setting.choices:
        arguments["metavar"] = setting.metavar or setting.type.__name__.strip("_").upper()
    elif setting.choices:
        arguments["metavar"] = "{" + ",".join(setting.choices) + "}"
    if setting.repeated:
        arguments["nargs"] = "+" if setting.required else "*"
    if positional:
        if not setting.repeated and not setting.required:
            arguments["nargs"] = "?"
        action = parser.add_argument(setting.name, **arguments)
        vars(action)["setting"] = setting  # for completion.py
        return
    names = [f"--{name}" for name in (setting.name, *setting.old_names)]
    if setting.type is bool:
        action = parser.add_argument(*names, dest=setting.name, nargs="?", const="true", **arguments)
    else:
        action = parser.add_argument(*names, dest=setting.name, **arguments)
    vars(action)["setting"] = setting


def normalise(argv: list[str]) -> list[str]:
    """`argv` with `-` in option names replaced by `_`, so that `--learning-rate` equals `--learning_rate`."""
    end = argv.index("--") if "--" in argv else len(argv)

    def spell(token: str) -> str:
        if not token.startswith("--"):
            return token
        name, equals, value = token.partition("=")
        return "--" + name[2:].replace("-", "_") + equals + value

    return [spell(t) for t in argv[:end]] + argv[end:]


def take_debug(argv: list[str]) -> tuple[bool, list[str]]:
    """Whether our --debug is among the words, and the others. `--debug underflow_overflow` is TrainingArguments'."""
    ours = [
        i for i, word in enumerate(argv) if word == "--debug" and not set(argv[i + 1 : i + 2]) & set(TRAINING_DEBUG)
    ]
    return bool(ours), [word for i, word in enumerate(argv) if i not in ours]


def extra_options(command: str, unknown: list[str]) -> dict[str, str]:
    """Options that are not ours, as {name: text}; UsageError for anything that is not an option."""
    known = settings.settings_of(options.COMMAND_OPTIONS[command]) if command in options.COMMAND_OPTIONS else {}
    extra: dict[str, str] = {}
    rest = list(unknown)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--"):
            raise UsageError(f"unexpected argument {token!r}")
        name, equals, value = token[2:].partition("=")
        if not COMMANDS[command].extras:
            raise UsageError(f"unknown option --{name}{settings.nearest(name, known)}")
        extra[name] = value if equals else (rest.pop(0) if rest and not rest[0].startswith("--") else "true")
    return extra
