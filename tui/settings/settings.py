"""What a command would be started with: the workspace's settings, a preset, and what was typed in the panel."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from presets import PresetError, load_presets
from surgvqa.config import options, resolve
from surgvqa.config.resolve import Resolved
from surgvqa.config.settings import Path_, convert, settings_of
from surgvqa.config.workspace import WORKSPACE_FILE, Workspace
from surgvqa.errors import UsageError
from tui import words

EDITED = "edited here"
LARGEST = {"learning_rate": 1.0}
"""Values beyond which a number is surely a slip of the finger."""


@dataclass
class Settings:
    """The settings of one command. `edited` holds text as it was typed; everything else is the engine's own rules."""

    command: str
    workspace: Workspace
    edited: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.known = settings_of(options.COMMAND_OPTIONS[self.command])

    def resolve(self, preset: str | None) -> tuple[Resolved, list[str]]:
        """The options as they would be used, and the names of required ones that nothing sets."""
        given = {name: convert(self.known[name], text, EDITED) for name, text in self.edited.items()}
        missing = [
            name
            for name, setting in self.known.items()
            if setting.required and name not in given and self.workspace.value(name, self.command) is None
        ]
        return resolve.resolve(
            self.command, {**given, **dict.fromkeys(missing, Path_(""))}, self.workspace, preset
        ), missing

    def edit(self, name: str, text: str) -> None:
        """Keeps a typed value. Raises UsageError when it is no value of this setting or out of its bounds."""
        value = convert(self.known[name], text, EDITED)
        expected = self.range_of(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not self._within(name, value):
            raise UsageError(f"{EDITED}: {name} is {text}, expected {expected or 'a finite number'}")
        self.edited[name] = text

    def _within(self, name: str, value: float) -> bool:
        if name == "max_steps":
            return value == -1 or value >= 1
        return math.isfinite(value) and self.known[name].bounds.admit(value) and value <= LARGEST.get(name, math.inf)

    def range_of(self, name: str) -> str:
        """What values a setting takes, for people: "at least 1", "auto, off"; '' when there is nothing to say."""
        if name == "max_steps":
            return "at least 1, or -1 to count epochs"
        setting = self.known[name]
        if setting.choices:
            return ", ".join(setting.choices)
        parts = [str(setting.bounds), f"at most {LARGEST[name]:g}" if name in LARGEST else ""]
        return " and ".join(part for part in parts if part)

    def problem_with(self, name: str, text: str) -> str:
        """Why `text` is no value of this setting, in a few words; '' when it is one."""
        before = self.edited.get(name)
        try:
            self.edit(name, text.strip())
        except UsageError as error:
            return _expected(str(error))
        finally:
            if before is None:
                self.edited.pop(name, None)
            else:
                self.edited[name] = before
        return ""

    def revert(self, name: str) -> bool:
        """Forgets what was typed; whether there was anything."""
        return self.edited.pop(name, None) is not None

    def argv(self, preset: str | None = None, everything: bool = False) -> list[str]:
        """The command line that starts this: the command, the preset, and what was edited.

        `everything`: also what surgvqa.toml sets, with absolute paths, so that another machine does what is shown here.
        """
        given = dict(self.edited)
        if everything:
            resolved = self.resolve(preset)[0]
            given = {
                name: self._word(name, getattr(resolved.options, name))
                for name, source in resolved.sources.items()
                if source in (WORKSPACE_FILE, "command line") and getattr(resolved.options, name) not in (None, "")
            }
        return [
            self.command,
            *(["--preset", preset] if preset else []),
            *(f"--{name}={text}" for name, text in given.items()),
        ]

    def _word(self, name: str, value: Any) -> str:
        if self.known[name].type is Path_:
            return str(Path(self.workspace.root, os.path.expanduser(value)))
        return repr(value) if isinstance(value, float) else words.value(value)


def _expected(message: str) -> str:
    return "expected " + message.partition(", expected ")[2]


@dataclass(frozen=True)
class Change:
    """What a preset would do to one setting."""

    name: str
    old: Any
    new: Any
    pinned_by: str | None
    """What holds the old value in spite of the preset, or None."""


def preset_changes(settings: Settings, current: str | None, new: str) -> list[Change]:
    """Every setting that going from preset `current` to `new` touches, the pinned ones too."""
    try:
        available = {p.name: p for p in load_presets(settings.workspace.root)}
    except PresetError as error:
        raise UsageError(str(error)) from None
    touched = {**(available[current].settings if current in available else {}), **available[new].settings}
    before, after = settings.resolve(current)[0], settings.resolve(new)[0]
    changes = []
    for name in touched:
        if name not in settings.known:
            continue
        old, value = getattr(before.options, name), getattr(after.options, name)
        wanted = available[new].settings.get(name, settings.known[name].default)
        source = after.sources[name]
        held = source in (WORKSPACE_FILE, "command line") and value != wanted
        if old != value or held:
            by = EDITED if source == "command line" else source
            changes.append(Change(name, old, wanted if held else value, by if held else None))
    return changes
