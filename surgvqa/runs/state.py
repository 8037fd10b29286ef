"""The state of a run. It is derived from its folder and its process, never stored."""

from __future__ import annotations

import platform
import time
from pathlib import Path
from typing import Any

from surgvqa.files import open_regular
from surgvqa.runs.events import finished_event
from surgvqa.runs.process import job_processes, machine_id, process_identity
from surgvqa.untrusted import of_kinds, parse_object

STARTING_GRACE_S = 60.0  # a launched job may take this long to write its own run.json
LARGEST_RUN_JSON = 16 << 20

FIELDS = {
    **dict.fromkeys(("id", "command", "host", "machine", "cwd", "identity", "preset"), "text"),
    "started": "a time",
    "pid": "a whole number",
    "argv": "a list",
    **dict.fromkeys(("options", "versions"), "an object"),
}
"""The types of the keys of run.json that are present and not null."""


def read_run_json(folder: Path) -> dict[str, Any]:
    """run.json as a dict, without keys of the wrong type; {} when it is missing or damaged."""
    return check_run_json(folder)[0]


def check_run_json(folder: Path) -> tuple[dict[str, Any], str]:
    """What `read_run_json` returns, and what is wrong with the file; '' if nothing is, or if there is no file."""
    file = Path(folder) / "run.json"
    try:
        with open_regular(file) as stream:
            content = stream.read(LARGEST_RUN_JSON + 1)
        if len(content) > LARGEST_RUN_JSON:
            return {}, f"run.json: larger than {LARGEST_RUN_JSON >> 20} MiB, larger than any run writes"
        info, wrong = of_kinds(parse_object(content), FIELDS)
    except (FileNotFoundError, NotADirectoryError):
        return {}, ""
    except OSError as error:
        return {}, f"run.json: {error.strerror}"
    except ValueError as error:
        return {}, f"run.json: not valid JSON: {error}"
    info = {key: value for key, value in info.items() if value is not None}
    return info, f"run.json: {wrong[0]}" if wrong else ""


def state_of(folder: Path, finished: dict[str, Any] | None = None) -> str:
    """starting | running | finished | failed | stopped | died | unknown, derived from the folder and the process."""
    folder = Path(folder)
    finished = finished or finished_event(folder)
    if finished:
        return str(finished.get("state", "finished"))
    info = read_run_json(folder)
    if not info and str(folder.absolute()) in job_processes():  # its folder was deleted while it ran
        return "running"
    identity = info.get("identity")
    if info.get("pid") and identity and process_identity(info["pid"]) == identity:  # whatever the host name is now
        return "running"
    if not info or not _of_this_machine(info):
        return "unknown"
    if info.get("pid"):
        finished = finished_event(folder)  # look again: the run may have ended in between
        return str(finished.get("state", "finished")) if finished else "died"
    return "starting" if abs(time.time() - info.get("started", 0)) < STARTING_GRACE_S else "died"


def _of_this_machine(info: dict[str, Any]) -> bool:
    """Whether the job ran on this machine, even if renamed since. Several machines may share run folders."""
    same_name = info.get("host") in (None, platform.node())
    return same_name or (bool(info.get("machine")) and info["machine"] == machine_id())
