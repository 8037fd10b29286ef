"""Finds predictions: a file of them, or a run of `surgvqa evaluate` by id, name or folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgvqa.config.workspace import Workspace
from surgvqa.errors import UsageError
from surgvqa.runs.history import find_run
from surgvqa.runs.state import read_run_json

PREDICTIONS, SCORES = "predictions.jsonl", "report.json"
DATA_OPTIONS = ("eval_data_path", "frames_dir", "audio_dir", "eval_audio_dir")


@dataclass(frozen=True)
class Source:
    """A file of predictions."""

    name: str
    """Name in messages: the run's id, or the file's name without its extension."""
    file: Path
    run: Path | None = None
    """The run folder with the file."""
    options: Mapping[str, str] = field(default_factory=dict)
    """The run's paths of samples, frames and recordings."""


def find_source(name: str, workspace: Workspace) -> Source:
    """The source for `name`. Raises UsageError when it is neither a file nor a finished run of `evaluate`."""
    path = Path(os.path.expanduser(name))
    if path.is_file():
        return Source(path.stem, path)
    if (path / PREDICTIONS).is_file():
        folder = path.resolve()
    elif os.sep in name or path.suffix == ".jsonl":
        raise UsageError(f"{name}: no such file, expected a run, a file of predictions or a file of samples")
    else:
        folder = find_run(name, workspace.runs_dirs, "evaluate")
    file = folder / PREDICTIONS
    if not file.is_file():
        raise UsageError(f"{name}: no {PREDICTIONS} in {folder}, expected a run of `surgvqa evaluate`")
    return Source(folder.name, file, folder, _data_options(read_run_json(folder)))


def _data_options(info: Mapping[str, Any]) -> dict[str, str]:
    options = info.get("options")
    found = {}
    for name in DATA_OPTIONS:
        entry = options.get(name) if isinstance(options, dict) else None
        value = entry.get("value") if isinstance(entry, dict) else entry
        if isinstance(value, str) and value:
            found[name] = value
    return found
