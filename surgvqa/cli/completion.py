"""`--completion SHELL`: shtab makes the shell's completion script from the parser."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from surgvqa.config.settings import Path_, Setting

SHELLS = ("bash", "zsh", "fish")


class PrintCompletion(argparse.Action):
    """Prints the completion script for the parser and exits."""

    def __call__(self, parser: argparse.ArgumentParser, *arguments: Any, **keywords: Any) -> None:
        import shtab

        for action in _actions(parser):
            setting: Setting | None = getattr(action, "setting", None)
            if setting and setting.choices and not action.choices:
                action.choices = setting.choices  # the parser leaves it to the settings, which explain more
            elif setting and setting.type is bool:
                action.choices = ("true", "false")
            elif setting and setting.type is Path_:
                vars(action)["complete"] = shtab.FILE
            elif action.metavar == "DIR":
                vars(action)["complete"] = shtab.DIRECTORY
        shell = arguments[1]
        sys.stdout.write(shtab.complete(parser, shell) + "\n")
        parser.exit()


def add_completion(parser: argparse.ArgumentParser) -> None:
    """Adds the option --completion to a program's parser."""
    parser.add_argument(
        "--completion",
        action=PrintCompletion,
        choices=SHELLS,
        default=argparse.SUPPRESS,
        help="print what this shell completes, to be kept where it looks for completions",
    )


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:  # no public way leads to what a parser knows
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for sub in {id(sub): sub for sub in action.choices.values()}.values():
                yield from _actions(sub)
