"""Combines the sources of each value: built-in default < preset < surgvqa.toml < command line."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from presets import Preset, PresetError, load_presets
from surgvqa.config.options import COMMAND_OPTIONS, DataOptions, TrainOptions
from surgvqa.config.settings import Setting, convert, nearest, settings_of
from surgvqa.config.workspace import WORKSPACE_FILE, Workspace
from surgvqa.errors import UsageError


@dataclass
class Resolved:
    """The options of one command as they will be used."""

    options: Any
    """An instance of the command's dataclass."""
    sources: dict[str, str]
    """Where each value came from: default, preset NAME, surgvqa.toml, command line."""
    preset: str | None

    def record(self) -> dict[str, dict[str, Any]]:
        """{setting: {value, from}} for run.json."""
        listed = {name: {"value": getattr(self.options, name), "from": source} for name, source in self.sources.items()}
        extra = self.options.extra if isinstance(self.options, TrainOptions) else {}
        listed.update({name: {"value": value, "from": "command line"} for name, value in extra.items()})
        return listed


@dataclass(frozen=True)
class Inherited:
    """The options with which a resumed run or an evaluated adapter was trained."""

    values: dict[str, Any]
    origin: str
    """For run.json: where the values came from."""
    preset: str | None = None
    extra: dict[str, str] = field(default_factory=dict)


def resolve(
    command: str,
    given: dict[str, Any],
    workspace: Workspace,
    preset: str | None = None,
    extra: dict[str, str] | None = None,
    inherited: Inherited | None = None,
) -> Resolved:
    """Combines default < preset < surgvqa.toml < inherited < command line into the options of `command`.

    `given` holds the converted values from the command line. The settings of a preset that the command line names
    override inherited values. Raises UsageError for an unknown preset and for a required option without a value.
    """
    inherited = inherited or Inherited({}, "")
    options_class = COMMAND_OPTIONS[command]
    known = settings_of(options_class)
    chosen = _preset(known, workspace, preset, inherited.preset)
    named = set(chosen.settings) if chosen and preset else set()
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for source, found in (
        ("default", {name: setting.default for name, setting in known.items() if not setting.required}),
        *([(f"preset {chosen.name}", _converted(known, chosen.settings, f"preset {chosen.name}"))] if chosen else []),
        (WORKSPACE_FILE, _from_workspace(known, workspace, command)),
        (inherited.origin, _converted(known, inherited.values, inherited.origin, named)),
        ("command line", given),
    ):
        values |= found
        sources |= dict.fromkeys(found, source)
    if missing := [name for name in known if name not in values]:
        raise UsageError(
            "missing " + ", ".join(f"--{name}" for name in missing) + f" (or the key of that name in {workspace.file})"
        )
    options = options_class(**values)
    if isinstance(options, TrainOptions):
        options.extra = {**inherited.extra, **(extra or {})}
    return Resolved(options, sources, chosen.name if chosen else None)


def _converted(
    known: dict[str, Setting], values: dict[str, Any], where: str, but: Collection[str] = ()
) -> dict[str, Any]:
    """The `values` that are settings of this command, except those in `but`, converted to the settings' types."""
    return {
        name: convert(known[name], value, where) for name, value in values.items() if name in known and name not in but
    }


def _preset(known: dict[str, Setting], workspace: Workspace, named: str | None, earlier: str | None) -> Preset | None:
    """The preset named on the command line, else the earlier run's, else the workspace's, else the first.

    None for a command without DataOptions. Raises UsageError for an unknown preset.
    """
    try:
        available = {preset.name: preset for preset in load_presets(workspace.root)}
    except PresetError as error:
        raise UsageError(str(error)) from None
    if not any(name in known for name in settings_of(DataOptions)):
        return None
    name = named or (earlier if earlier in available else None) or workspace.preset or next(iter(available), None)
    if name and name not in available:
        where = "--preset" if named else str(workspace.file)
        raise UsageError(f"{where}: no preset {name}{nearest(name, available)} (surgvqa presets lists them)")
    return available[name] if name else None


def _from_workspace(known: dict[str, Setting], workspace: Workspace, command: str) -> dict[str, Any]:
    values = {name: workspace.value(name, command) for name in known}
    base = values.get("model_name_or_path")
    if command == "budget" and base and not Path(base).exists():  # not merged yet; Stage 1 has the same sizes
        values["model_name_or_path"] = workspace.value("stage1_model_path", "merge")
    return {name: value for name, value in values.items() if value is not None}
