"""`surgvqa evaluate --resume RUN`: a new run with the options of an interrupted one. Light to import."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from surgvqa.config.options import EvaluateOptions
from surgvqa.config.resolve import Inherited
from surgvqa.config.settings import Path_, settings_of
from surgvqa.config.workspace import Workspace
from surgvqa.errors import UsageError
from surgvqa.runs.history import find_run, start_of
from surgvqa.runs.state import read_run_json, state_of

NOT_INHERITED = ("resume", "output_file")


def inherit(given: dict[str, Any], workspace: Workspace, own: str | None = None) -> Inherited:
    """The options of the run named in `given["resume"]`, which is replaced by the run's folder.

    `own` is the id of the run that is starting. Other options in `given` take precedence. Raises UsageError when the
    run is not an evaluation by a model, still runs, or never had options.
    """
    before = start_of(own, workspace.runs_dirs)
    folder = find_run(str(given["resume"]), workspace.runs_dirs, "evaluate", before)
    info = read_run_json(folder)
    command, recorded = info.get("command"), info.get("options")
    if command != "evaluate":
        raise UsageError(f"resume: {folder.name} is a {command} run, expected one of `surgvqa evaluate`")
    if not recorded:
        raise UsageError(f"resume: {folder.name} ended before it began, so there is nothing to resume; start it again")
    if state_of(folder) in ("running", "starting"):
        raise UsageError(f"resume: {folder.name} still runs; wait for it, or stop it: surgvqa stop {folder.name}")
    given["resume"] = str(folder)
    known, cwd = settings_of(EvaluateOptions), Path(info.get("cwd") or ".")
    values = {
        name: entry["value"]
        for name, entry in recorded.items()
        if name in known and name not in NOT_INHERITED and isinstance(entry, dict) and "value" in entry
    }
    for name, value in values.items():
        if known[name].type is Path_ and isinstance(value, str):
            values[name] = os.path.abspath(cwd / value)
    return Inherited(values, f"run {folder.name}", info.get("preset"))
