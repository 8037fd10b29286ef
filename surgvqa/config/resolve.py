"""Where each value comes from: built-in default < preset < surgvqa.toml < command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgvqa.config.options import COMMAND_OPTIONS, DataOptions
from surgvqa.config.settings import convert, nearest, settings_of
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
    extra: dict[str, str]
    """Options that are not ours: further TrainingArguments fields, as text."""

    def record(self) -> dict[str, dict[str, Any]]:
        """{setting: {value, from}} for run.json."""
        listed = {name: {"value": getattr(self.options, name), "from": source} for name, source in self.sources.items()}
        listed.update({name: {"value": value, "from": "command line"} for name, value in self.extra.items()})
        return listed


@dataclass(frozen=True)
class Inherited:
    """What a resumed run, or an adapter that is evaluated, was trained with."""

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
    """Default < preset < surgvqa.toml < command line (`given`: converted values of the options that were named).

    `inherited` values stand between surgvqa.toml and what was named: a preset named with them is above them.
    Raises UsageError for an unknown preset and for a required option that no source names.
    """
    from presets import PresetError, load_presets

    inherited = inherited or Inherited({}, "")
    options_class = COMMAND_OPTIONS[command]
    known = settings_of(options_class)
    values = {name: s.default for name, s in known.items() if not s.required}
    sources = dict.fromkeys(values, "default")
    try:
        available = load_presets(workspace.root)
    except PresetError as error:
        raise UsageError(str(error)) from None
    takes_preset = any(name in known for name in settings_of(DataOptions))
    earlier = next((p.name for p in available if p.name == inherited.preset), None)
    name = preset or earlier or workspace.preset or (available[0].name if available else None)
    chosen = None
    if takes_preset and name:
        chosen = next((p for p in available if p.name == name), None)
        if chosen is None:
            where = "--preset" if preset else str(workspace.file)
            raise UsageError(
                f"{where}: no preset {name}{nearest(name, [p.name for p in available])} (surgvqa presets lists them)"
            )
        for key, value in chosen.settings.items():
            if key in known:
                values[key], sources[key] = convert(known[key], value, f"preset {name}"), f"preset {name}"
    for key in known:
        value = workspace.value(key, command)
        if command == "budget" and key == "model_name_or_path" and value and not Path(value).exists():
            value = workspace.value("stage1_model_path", "merge")  # not merged yet: the sizes are the same
        if value is not None:
            values[key], sources[key] = value, WORKSPACE_FILE
    for key, value in inherited.values.items():
        if key in known and not (preset and chosen and key in chosen.settings):
            values[key], sources[key] = convert(known[key], value, inherited.origin), inherited.origin
    for key, value in given.items():
        values[key], sources[key] = value, "command line"
    missing = [key for key in known if key not in values]
    if missing:
        raise UsageError(
            "missing " + ", ".join(f"--{key}" for key in missing) + f" (or the key of that name in {workspace.file})"
        )
    extra = {**inherited.extra, **(extra or {})}
    return Resolved(options_class(**values), sources, chosen.name if chosen else None, extra)
