"""A setting: a field of an options dataclass that is also a command-line option and a key of surgvqa.toml."""

from __future__ import annotations

import difflib
import math
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from surgvqa.errors import UsageError

NONE = ("none", "None", "null", "")
"""Texts that mean None for an optional setting."""


class Path_(str):
    """A path option. In surgvqa.toml it is relative to the workspace, on the command line to the current folder."""


def option(
    default: Any = MISSING,
    help: str = "",
    choices: tuple[str, ...] | None = None,
    metavar: str | None = None,
    *,
    old_names: tuple[str, ...] = (),
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field that is also a command-line option and a key of surgvqa.toml.

    A number must be at least `least`, more than `above` and less than `below`; see `require_bounds`.
    `old_names`: its names in the author's scripts, which the command line also accepts.
    """
    bounds = Bounds(least, above, below)
    metadata = {"help": help, "choices": choices, "metavar": metavar, "bounds": bounds, "old_names": old_names}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Bounds:
    """Bounds of a number; None: no bound on that side."""

    least: float | None = None
    above: float | None = None
    below: float | None = None

    def admit(self, value: float) -> bool:
        """Whether `value` is within every bound."""
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        """For messages: "at least 0 and less than 1"."""
        named = (("at least", self.least), ("more than", self.above), ("less than", self.below))
        return " and ".join(f"{words} {bound:g}" for words, bound in named if bound is not None)


@dataclass(frozen=True)
class Setting:
    """One field of an options dataclass: its name, plain type and metadata."""

    name: str
    type: type  # bool, int, float, str or Path_
    repeated: bool
    optional: bool
    default: Any
    help: str
    choices: tuple[str, ...] | None
    metavar: str | None
    bounds: Bounds = Bounds()
    old_names: tuple[str, ...] = ()

    @property
    def required(self) -> bool:
        return self.default is MISSING


def settings_of(options_class: type) -> dict[str, Setting]:
    """The settings of an options dataclass, by name, in order of declaration."""
    hints = typing.get_type_hints(options_class)
    found = {}
    for f in fields(options_class):
        if "help" not in f.metadata:  # not a setting
            continue
        hint, optional, repeated = hints[f.name], False, False
        if isinstance(hint, types.UnionType):
            optional = True
            hint = next(a for a in hint.__args__ if a is not type(None))
        if typing.get_origin(hint) is list:
            repeated, hint = True, hint.__args__[0]
        found[f.name] = Setting(
            f.name,
            hint,
            repeated,
            optional,
            f.default,
            f.metadata["help"],
            f.metadata["choices"],
            f.metadata["metavar"],
            f.metadata["bounds"],
            f.metadata["old_names"],
        )
    return found


def require_bounds(options: Any, sources: Mapping[str, str] | None = None) -> None:
    """Raises UsageError for the first number of an options dataclass that is out of bounds.

    `sources` says where each value came from, for the message.
    """
    for name, setting in settings_of(type(options)).items():
        value = getattr(options, name)
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(number, (int, float)) and not setting.bounds.admit(number):
                where = f"{sources[name]}: " if sources else ""
                found = number if isinstance(number, int) else f"{number:g}"
                raise UsageError(f"{where}{name} is {found}, expected {setting.bounds}")


def convert(setting: Setting, value: Any, where: str) -> Any:
    """`value` (text from the command line, or a TOML value) converted to the setting's type.

    Raises UsageError, which names `where` the value came from.
    """

    def bad(expected: str) -> UsageError:
        return UsageError(f"{where}: {setting.name} is {value!r}, expected {expected}")

    if value is None or (setting.optional and value in NONE):
        if setting.optional:
            return None
        raise bad("a value")
    if setting.repeated:
        if not isinstance(value, list):
            raise bad("a list")
        return [convert(_item_setting(setting), item, where) for item in value]
    if setting.type is bool:
        if isinstance(value, bool):
            return value
        known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if str(value).lower() not in known:
            raise bad("true or false")
        return known[str(value).lower()]
    if not isinstance(value, (str, int, float)) or isinstance(value, bool):  # TOML also has lists, tables and dates
        raise bad("one path" if setting.type is Path_ else f"one {setting.type.__name__}")
    if setting.type in (int, float):
        try:
            number = float(value)
            if not math.isfinite(number):
                raise ValueError
            if setting.type is float:
                return number
            if number != int(number):
                raise ValueError
            return int(number)
        except (ValueError, OverflowError):
            raise bad("a whole number" if setting.type is int else "a number") from None
    if setting.choices and str(value) not in setting.choices:
        raise bad("one of " + ", ".join(setting.choices))
    return Path_(os.path.expanduser(str(value))) if setting.type is Path_ else setting.type(value)


def _item_setting(setting: Setting) -> Setting:
    return Setting(**{**setting.__dict__, "repeated": False})


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """`; did you mean x?` for the closest known name; "" when none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""
