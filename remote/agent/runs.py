"""The run folders on the host: listed, followed, stopped."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

from surgvqa.errors import UsageError
from surgvqa.files import open_regular, write_json_atomic
from surgvqa.runs import events, history
from surgvqa.runs.process import descendants, end_all, job_processes, process_identity, signal_exactly
from surgvqa.runs.state import read_run_json, state_of
from surgvqa.runs.supervisor import close_events
from surgvqa.untrusted import of_kinds, parse_object

POLL_S = 0.2
STATE_EVERY_S = 1.0
EXIT_PATIENCE_S = 10.0
READ_AT_ONCE = 1 << 18
FOLLOWED = ("events.jsonl", "log.txt")


def _find(workspace: str, run: str, command: str | None = None) -> Path:
    if "/" in run or "\0" in run:
        raise UsageError(f"run {run!r}: expected an id, the beginning of one, a run name, or last")
    return history.find_run(run, [Path(workspace, "runs")], command)


def _noted(file: Path, kinds: dict[str, str]) -> dict[str, Any]:
    """A JSON object that the supervisor wrote, without fields of another kind; {} when it is missing or damaged."""
    with contextlib.suppress(OSError, ValueError), open_regular(file) as stream:
        return of_kinds(parse_object(stream.read()), kinds)[0]
    return {}


def _exit_of(folder: Path) -> dict[str, Any]:
    return _noted(folder / "exit.json", dict.fromkeys(("exit_code", "signal", "swept"), "a whole number"))


def _supervisor_of(folder: Path) -> dict[str, Any]:
    return _noted(folder / "supervisor.json", {"pid": "a whole number", "identity": "text"})


def folders_of(workspace: str, folder: Path, info: dict[str, Any]) -> list[str]:
    """What belongs to a run, relative to the workspace: its folder, and its output_dir where that lies elsewhere in
    the workspace (a resumed run writes into the folder of the run that it goes on with)."""
    found = ["runs/" + folder.name]
    noted = info.get("options", {}).get("output_dir")
    output = noted.get("value") if isinstance(noted, dict) else None
    if isinstance(output, str) and output:
        with contextlib.suppress(OSError, ValueError):  # what cannot be a path, or not here
            path = Path(os.path.realpath(os.path.join(info.get("cwd") or workspace, output)))
            inside = path.is_dir() and Path(workspace) in path.parents and folder not in (path, *path.parents)
            found += [path.relative_to(workspace).as_posix()] if inside else []
    return found


def runs(channel: Any, workspace: str, run: str | None = None, command: str | None = None) -> dict[str, Any]:
    """Every run of the workspace, newest first, whoever started it; or one of them with its run.json.

    `run` "last" is the newest of `command`, where one is given.
    """
    if run is not None:
        folder = _find(workspace, run, command)
        info = read_run_json(folder)
        return {
            "id": folder.name,
            "state": state_of(folder),
            "run": info,
            "exit": _exit_of(folder),
            "folders": folders_of(workspace, folder, info),
        }
    listed = history.list_runs(Path(workspace, "runs"))
    return {
        "runs": [{**r.data(), "exit": _exit_of(r.folder)} for r in listed],
        "time": time.time(),
    }


def follow(channel: Any, workspace: str, run: str, offsets: dict[str, int]) -> dict[str, Any]:
    """Says what is new in the run's events and log, from these byte offsets on, until the run has ended.

    {"run": id, "state"}, {"file", "at", "text"} (bytes as UTF-8 with surrogate escapes), {"file", "restart": true}
    when a file was replaced or became shorter.
    """
    folder = _find(workspace, run)
    at = {name: int(offsets.get(name, 0)) for name in FOLLOWED}
    inodes: dict[str, int] = {}
    state, checked, last_said, settled = "", 0.0, None, False
    while True:
        if time.monotonic() - checked > STATE_EVERY_S:
            state, checked = state_of(folder), time.monotonic()
            if state != last_said:
                channel.say({"run": folder.name, "state": state})
                last_said = state
        ended = state not in ("starting", "running")
        news = False
        for name in FOLLOWED:
            with contextlib.suppress(FileNotFoundError), open_regular(folder / name) as file:
                stat = os.fstat(file.fileno())
                if stat.st_size < at[name] or inodes.get(name, stat.st_ino) != stat.st_ino:
                    at[name] = 0
                    channel.say({"file": name, "restart": True})
                inodes[name] = stat.st_ino
                file.seek(at[name])
                data = file.read(READ_AT_ONCE)
                if data:
                    news = True
                    channel.say({"file": name, "at": at[name], "text": data.decode("utf-8", "surrogateescape")})
                    at[name] += len(data)
        if ended and not news:
            if not settled:  # its supervisor sweeps up, says of a killed job by what, and notes how it ended
                supervisor = _supervisor_of(folder)
                _wait_gone(supervisor.get("pid"), supervisor.get("identity"), EXIT_PATIENCE_S)
                settled, state = True, state_of(folder)
                continue
            finished = events.finished_event(folder) or {}
            return {"run": folder.name, "state": state, "finished": finished, "exit": _exit_of(folder)}
        if not news:
            time.sleep(POLL_S)


def stop(channel: Any, workspace: str, run: str, grace_s: float) -> dict[str, Any]:
    """SIGTERM to the job, time for a checkpoint, then SIGKILL to all that is left of it; nobody else's process.

    The supervisor does it where there is one; a job started by hand is ended from here.
    """
    folder = _find(workspace, run)
    before, began = state_of(folder), time.monotonic()
    supervisor = _supervisor_of(folder)
    if before in ("running", "starting") and folder.is_dir():
        write_json_atomic(folder / "stop.json", {"grace_s": grace_s})
    pid, identity = supervisor.get("pid"), supervisor.get("identity")
    if pid and signal_exactly(pid, identity, 15):
        _wait_gone(pid, identity, grace_s + 15)
        if process_identity(pid) == identity:  # wedged itself: end all that hangs below it
            end_all([*descendants(pid), pid], 0.0)
    info, lost = read_run_json(folder), None
    if not info and (lost := job_processes().get(str(folder))):  # its folder was deleted under it
        info = {"pid": lost[0], "identity": process_identity(lost[0])}
    pid, identity = info.get("pid"), info.get("identity")
    if pid and identity and process_identity(pid) == identity:
        family = descendants(pid)
        known = {p: process_identity(p) for p in family}
        signal_exactly(pid, identity, 15)
        _wait_gone(pid, identity, grace_s)
        if process_identity(pid) == identity:
            end_all([*descendants(pid), pid], 0.0)
        end_all([p for p in family if known[p] and process_identity(p) == known[p]], 2.0)
    if before == "running" and state_of(folder) == "died":
        close_events(folder, None, None, stopped=True)
    return {
        "run": folder.name,
        "state": "stopped" if lost else state_of(folder),
        "before": before,
        "seconds": time.monotonic() - began,
        "exit": _exit_of(folder),
    }


def _wait_gone(pid: int | None, identity: str | None, patience_s: float) -> None:
    deadline = time.monotonic() + patience_s
    while pid and identity and process_identity(pid) == identity and time.monotonic() < deadline:
        time.sleep(0.05)
