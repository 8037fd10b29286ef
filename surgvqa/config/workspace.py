"""The workspace: a folder with a surgvqa.toml."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgvqa.config.options import COMMAND_OPTIONS
from surgvqa.config.settings import Path_, Setting, convert, nearest, settings_of
from surgvqa.errors import UsageError
from surgvqa.files import read_text

WORKSPACE_FILE = "surgvqa.toml"


@dataclass
class Workspace:
    """A folder with (perhaps) a surgvqa.toml; runs, presets and relative paths of the file belong to it."""

    root: Path
    values: dict[str, Any]
    """Top-level keys: for every command that knows them."""
    by_command: dict[str, dict[str, Any]]
    """[train], [merge], …: for that command alone."""

    @property
    def runs_dir(self) -> Path:
        return self.root / "runs"

    @property
    def runs_dirs(self) -> list[Path]:
        """Folders that may hold runs: runs/ here and, if this is no workspace, of the workspaces directly below."""
        found = [self.runs_dir]
        if not self.file.is_file():
            found += [file.parent / "runs" for file in sorted(self.root.glob(f"*/{WORKSPACE_FILE}"))]
        return [d for d in found if d.is_dir()] or found[:1]

    @property
    def file(self) -> Path:
        return self.root / WORKSPACE_FILE

    @property
    def preset(self) -> str | None:
        return self.values.get("preset")

    def value(self, name: str, command: str | None = None) -> Any:
        """The value of a key in surgvqa.toml (paths are absolute), or None. `budget` also reads the table [train]."""
        tables = ["budget", "train"] if command == "budget" else [command or ""]
        for table in tables:
            if name in self.by_command.get(table, {}):
                return self.by_command[table][name]
        return self.values.get(name)


def find_workspace(start: Path | None = None) -> Path:
    """The nearest folder at or above `start` with a surgvqa.toml; `start` itself when there is none."""
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / WORKSPACE_FILE).is_file():
            return folder
    return start


def load_workspace(root: Path) -> Workspace:
    """Reads `root`/surgvqa.toml if it exists. Raises UsageError for unknown keys, wrong types and invalid TOML."""
    root = Path(root).resolve()
    file = root / WORKSPACE_FILE
    if not file.is_file():
        return Workspace(root, {}, {})
    try:
        document = tomllib.loads(read_text(file))
    except (ValueError, RecursionError) as error:  # invalid TOML, or a number of thousands of digits
        raise UsageError(f"{file}: not valid TOML: {error}") from None
    shared: dict[str, Setting] = {"preset": Setting("preset", str, False, False, None, "", None, None)}
    for options_class in COMMAND_OPTIONS.values():
        for name, setting in settings_of(options_class).items():
            shared.setdefault(name, setting)
    values, by_command = {}, {}
    for key, value in document.items():
        if isinstance(value, dict):
            if key not in COMMAND_OPTIONS:
                raise UsageError(f"{file}: unknown table [{key}]; known tables: {', '.join(COMMAND_OPTIONS)}")
            known = settings_of(COMMAND_OPTIONS[key])
            by_command[key] = {k: _file_value(known, k, v, file, f"[{key}] ") for k, v in value.items()}
        else:
            values[key] = _file_value(shared, key, value, file, "")
    return Workspace(root, values, by_command)


def _file_value(known: dict[str, Setting], key: str, value: Any, file: Path, table: str) -> Any:
    if key not in known:
        raise UsageError(f"{file}: unknown key {table}{key}{nearest(key, known)}")
    value = convert(known[key], value, str(file))
    if known[key].type is Path_ and value is not None:
        absolute = [Path_(file.parent / v) for v in (value if isinstance(value, list) else [value])]
        value = absolute if isinstance(value, list) else absolute[0]
    return value
