"""What was typed in the panel, written to surgvqa.toml; its comments and its order stay."""

from __future__ import annotations

from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError

from surgvqa.config.options import COMMAND_OPTIONS
from surgvqa.config.settings import Path_, convert, settings_of
from surgvqa.config.workspace import Workspace, load_workspace
from surgvqa.errors import UsageError
from surgvqa.files import read_text, write_synced


def save(workspace: Workspace, command: str, edited: dict[str, str], preset: str | None = None) -> list[str]:
    """Writes the edited settings of a command, and the preset where one is given and differs, and returns the names of
    what was written. `workspace` has the new values then.

    A key goes where the file has it: into the command's own table, else to the keys for all commands; a new one into
    the command's table. Raises UsageError when the file is no TOML or cannot be written.
    """
    file = workspace.file
    known = settings_of(COMMAND_OPTIONS[command])
    try:
        document = tomlkit.parse(read_text(file) if file.is_file() else "")
        written = []
        if preset is not None and document.get("preset") != preset:
            document["preset"] = preset
            written.append("preset")
        for name, text in edited.items():
            _put(document, command, name, _plain(convert(known[name], text, "edited here")))
            written.append(name)
        if written:
            workspace.root.mkdir(parents=True, exist_ok=True)
            write_synced(file.with_name(f"{file.name}.part"), tomlkit.dumps(document).encode())
            file.with_name(f"{file.name}.part").replace(file)
    except TOMLKitError as error:
        raise UsageError(f"{file}: not valid TOML: {error}") from None
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}") from None
    fresh = load_workspace(workspace.root)
    workspace.values, workspace.by_command = fresh.values, fresh.by_command
    return written


def _put(document: tomlkit.TOMLDocument, command: str, name: str, value: Any) -> None:
    own = document.get(command)
    table: Any = document if name in document and not (own is not None and name in own) else own
    if table is None:
        document[command] = table = tomlkit.table()
    if value is None:
        table.pop(name, None)
    else:
        table[name] = value


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path_) else value
