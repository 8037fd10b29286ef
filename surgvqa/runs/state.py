"""The state of a run, derived from its folder and its process, never stored."""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import Any

from surgvqa.runs.events import finished_event
from surgvqa.runs.process import job_processes, process_identity
from surgvqa.untrusted import parse_object

STARTING_GRACE_S = 60.0  # a launched job may take this long before it first speaks


TYPES: dict[str, Any] = {
    "id": str,
    "command": str,
    "host": str,
    "cwd": str,
    "identity": str,
    "preset": str,
    "started": (int, float),
    "pid": int,
    "argv": list,
    "options": dict,
    "versions": dict,
}
"""What the keys of run.json are, where they are there."""


def read_run_json(folder: Path) -> dict[str, Any]:
    """run.json as a dict, without keys of the wrong type; {} when it is missing or damaged."""
    try:
        info = parse_object((Path(folder) / "run.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return {key: value for key, value in info.items() if isinstance(value, TYPES.get(key, object))}


def state_of(folder: Path, finished: dict[str, Any] | None = None) -> str:
    """starting | running | finished | failed | stopped | died | unknown, derived from the folder and the process."""
    folder = Path(folder)
    finished = finished or finished_event(folder)
    if finished:
        return str(finished.get("state", "finished"))
    info = read_run_json(folder)
    if not info and str(folder.absolute()) in job_processes():  # its folder was deleted under it
        return "running"
    identity = info.get("identity")
    if info.get("pid") and identity and process_identity(info["pid"]) == identity:  # under any host name
        return "running"
    if not info or info.get("host") not in (None, platform.node()):
        return "unknown"
    if info.get("pid"):
        finished = finished_event(folder)  # again: it may have ended between the two looks
        return str(finished.get("state", "finished")) if finished else "died"
    return "starting" if time.time() - info.get("started", 0) < STARTING_GRACE_S else "died"
