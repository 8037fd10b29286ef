"""What the host must know beside the files: the settings of the workspace with paths of its own."""

from __future__ import annotations

import json
from typing import Any

from remote.paths import remote_name
from surgvqa.config.options import COMMAND_OPTIONS
from surgvqa.config.settings import NONE, Path_, settings_of
from surgvqa.config.workspace import Workspace

STAYS_HERE = ("host", "boxes")
"""What names nothing on the host. Boxes are not sent: `evaluate --predictions` scores by what they show here."""


def host_settings(workspace: Workspace) -> str:
    """The workspace's surgvqa.toml as the host needs it: the same values, with the paths that they have there."""
    lines = ["# Written by surgvqa-remote upload, from the workspace it was called in."]

    def value(key: str, raw: Any, known: dict[str, Any]) -> str:
        setting = known.get(key)
        if raw is None:
            raw = NONE[0]
        elif setting is not None and setting.type is Path_:
            names = [remote_name(path, workspace, made_there=True) for path in (raw if setting.repeated else [raw])]
            raw = names if setting.repeated else names[0]
        text = json.dumps(raw, ensure_ascii=False).replace("\x7f", "\\u007f")  # which TOML wants escaped
        return f"{key} = {text}"

    everything = {n: s for options in COMMAND_OPTIONS.values() for n, s in settings_of(options).items()}
    lines += [value(key, raw, everything) for key, raw in workspace.values.items() if key not in STAYS_HERE]
    for table, values in workspace.by_command.items():
        if table in ("host", "demo"):
            continue
        lines += ["", f"[{table}]"]
        lines += [value(k, v, settings_of(COMMAND_OPTIONS[table])) for k, v in values.items() if k not in STAYS_HERE]
    return "\n".join(lines) + "\n"
