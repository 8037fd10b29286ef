"""The run folder: the only thing that a job and whoever watches it have in common.

    runs/<run id>/run.json       what was asked (atomic, written once when the job starts)
                 events.jsonl    append-only, one JSON object a line: {"v":1,"t":<unix s>,"kind":…,…}
                 log.txt         the process's own stdout and stderr
                 …               what the job makes

Event kinds and their fields:

    phase       name, text
    progress    phase, done, total, unit            (rate and time left are the reader's to derive)
                                                    (merge adds shard, shard_done, shard_total)
    plan        output, output_bytes, free_bytes, shards, modules_merged, …     (merge, before it writes)
    shard       file, bytes, sha256, done, total    (merge, each shard that is on the disk)
    metric      step, total_steps, epoch, loss, learning_rate, grad_norm, samples_per_s, data_wait, …
                                                    (data_wait: share of the step spent waiting for data, 0..1)
                                                    (compiled layers: graphs, recompiles, … of the process so far)
    eval        step, eval_loss, …
    gpu         device, backend ("cuda" or "host"), process_bytes, allocated_bytes, reserved_bytes, used_bytes,
                total_bytes, utilization_percent, temperature_c, power_w, others (processes), other_gpus
                                                    (what is unknown is absent)
    checkpoint  step, path
    preset      name, settings, step, predicted     (predicted: bytes of each component at the peak, from now on)
    oom         step, phase, text, requested_bytes, allocated_bytes, reserved_bytes, memory, predicted, action, …
    retreat     step, settings, predicted           (memory for time: nothing that the model sees changes)
    memory      phase, peak_allocated_bytes, peak_reserved_bytes, budget_gb  (a phase that is over)
    warning     text
    error       text
    finished    state ("finished" | "failed" | "stopped"), result, exit_code

A run's state is derived, never stored: see `state_of`. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from surgvqa import __version__
from surgvqa.errors import SurgvqaError, UsageError

STARTING_GRACE_S = 60.0  # a launched job may take this long before it first speaks
STOP_GRACE_S = 30.0  # SIGTERM -> checkpoint and clean end; then SIGKILL


# --- identity of a process -------------------------------------------------------------------------------------------


def process_identity(pid: int) -> str | None:
    """Boot id and start time (clock ticks) of a live process; None when it is gone or a zombie.

    A pid alone may be reused; the two together never are. Linux: /proc(5), fields after the last ')'.
    """
    if sys.platform == "linux":
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        except OSError:
            return None
        state, *rest = stat[stat.rindex(")") + 2 :].split()
        return None if state in "ZX" else f"{boot}:{rest[18]}"
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.2f}"
    except psutil.Error:
        return None


# --- writing ---------------------------------------------------------------------------------------------------------


def new_run_id(command: str) -> str:
    """Sorts by start time and says what it is: 20261122-163012-train-a3f."""
    return f"{datetime.now():%Y%m%d-%H%M%S}-{command}-{secrets.token_hex(2)[:3]}"


def write_json_atomic(path: Path, document: Any) -> None:
    """Whole or not at all: written beside, fsynced, renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(document, file, indent=1, default=str)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def finite(value: Any) -> Any:
    """JSON has no NaN: they become null, and a chart draws a gap."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value


class Run:
    """A job's own end of its run folder. Thread-safe; every event is one write(2) to an O_APPEND file.

    Use as a context manager: leaving it writes the `finished` event, also on an exception.
    """

    def __init__(self, folder: Path, observer: Callable[[dict[str, Any]], None] | None = None):
        self.folder = folder
        self.id = folder.name
        self.observer = observer
        self.result: dict[str, Any] = {}
        self.exit_code = 0
        self._lock = threading.Lock()
        self._events = os.open(folder / "events.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._last_progress: tuple[str, float] = ("", 0.0)

    @classmethod
    def create(
        cls,
        runs_dir: Path,
        command: str,
        *,
        run_id: str | None = None,
        options: dict[str, Any] | None = None,
        preset: str | None = None,
        argv: list[str] | None = None,
        observer: Callable[[dict[str, Any]], None] | None = None,
    ) -> Run:
        """Makes `runs_dir`/<id>/ and its run.json. `run_id` of a folder that `launch` prepared is taken over."""
        run_id = run_id or new_run_id(command)
        folder = Path(runs_dir) / run_id
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_json_atomic(
                folder / "run.json",
                {
                    "v": 1,
                    "id": run_id,
                    "command": command,
                    "argv": argv or sys.argv[1:],
                    "cwd": os.getcwd(),
                    "options": options or {},
                    "preset": preset,
                    "host": platform.node(),
                    "pid": os.getpid(),
                    "identity": process_identity(os.getpid()),
                    "started": time.time(),
                    "versions": {"surgvqa": __version__, "python": platform.python_version()},
                },
            )
            return cls(folder, observer)
        except OSError as error:
            raise SurgvqaError(f"{folder}: cannot write the run folder: {error.strerror}") from None

    def emit(self, kind: str, **fields: Any) -> None:
        """Appends one event. A full disk loses the event, never the job."""
        event = {"v": 1, "t": round(time.time(), 3), "kind": kind, **finite(fields)}
        line = (json.dumps(event, ensure_ascii=False, default=str) + "\n").encode()
        with self._lock:
            try:
                os.write(self._events, line)
            except OSError as error:
                print(f"event not written: {error.strerror}", file=sys.stderr)
        if self.observer:
            self.observer(event)

    def phase(self, name: str, text: str = "") -> None:
        """A new part of the job begins."""
        self.emit("phase", name=name, text=text)

    def progress(
        self, phase: str, done: float, total: float | None, unit: str, every_s: float = 0.2, **fields: Any
    ) -> None:
        """How far `phase` is; at most one event in `every_s` seconds, the first and the last always."""
        now = time.monotonic()
        if self._last_progress[0] == phase and now - self._last_progress[1] < every_s and done != total:
            return
        self._last_progress = (phase, now)
        self.emit("progress", phase=phase, done=done, total=total, unit=unit, **fields)

    def warning(self, text: str) -> None:
        """Something that the user should know and the job survives."""
        self.emit("warning", text=text)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is None:
            state = self.result.get("state", "finished")
        elif isinstance(error, KeyboardInterrupt):
            state, self.exit_code = "stopped", 1
        else:
            text = str(error) if isinstance(error, SurgvqaError) else f"{type(error).__name__}: {error}"
            self.emit("error", text=text)
            state, self.exit_code = "failed", getattr(error, "exit_code", 1)
        self.emit("finished", state=state, exit_code=self.exit_code, result=self.result)
        os.close(self._events)


# --- launching and stopping ------------------------------------------------------------------------------------------


def launch(command: str, argv: list[str], workspace: Path, runs_dir: Path | None = None) -> Path:
    """Starts `surgvqa COMMAND ARGV…` as a job in a session of its own and returns its run folder.

    The job outlives us; its output goes to the run folder's log.txt. It takes over the run.json written here.
    """
    run_id = new_run_id(command)
    folder = (runs_dir or Path(workspace) / "runs") / run_id
    try:
        folder.mkdir(parents=True)
        write_json_atomic(
            folder / "run.json",
            {
                "v": 1,
                "id": run_id,
                "command": command,
                "argv": [command, *argv],
                "cwd": str(workspace),
                "host": platform.node(),
                "pid": None,
                "started": time.time(),
            },
        )
        with open(folder / "log.txt", "ab") as log:
            subprocess.Popen(
                [sys.executable, "-m", "surgvqa", command, *argv, "--run_id", run_id],
                cwd=workspace,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "SURGVQA_DETACHED": "1"},
            )
    except OSError as error:
        raise SurgvqaError(f"{folder}: cannot start the job: {error.strerror}") from None
    return folder


def stop(folder: Path, grace_s: float = STOP_GRACE_S) -> str:
    """SIGTERM, then after `grace_s` seconds SIGKILL to the job and its children. Returns the state afterwards.

    Only the very process of the run is touched: pid and start time must match. A job that is starting is waited for.
    """
    import psutil

    while state_of(folder) == "starting":
        time.sleep(0.05)
    info = read_run_json(folder)
    pid, identity = info.get("pid"), info.get("identity")
    if not pid or not identity or process_identity(pid) != identity:
        return state_of(folder)
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):  # it may end by itself at any moment
        family = psutil.Process(pid).children(recursive=True)
        os.kill(pid, signal.SIGTERM)
        if not _gone(pid, identity, grace_s):
            family = psutil.Process(pid).children(recursive=True) or family
            os.kill(pid, signal.SIGKILL)
            _gone(pid, identity, 5.0)
    for child in family:  # psutil compares start times before it signals
        with contextlib.suppress(psutil.Error):
            child.kill()
    return state_of(folder)


def _gone(pid: int, identity: str, within_s: float) -> bool:
    """Waits until the process has ended; False when it still lives after `within_s` seconds."""
    deadline = time.monotonic() + within_s
    while process_identity(pid) == identity:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


# --- reading ---------------------------------------------------------------------------------------------------------


def read_run_json(folder: Path) -> dict[str, Any]:
    """run.json as a dict; {} when it is missing or damaged."""
    try:
        document = json.loads((Path(folder) / "run.json").read_text(encoding="utf-8"))
        return document if isinstance(document, dict) else {}
    except (OSError, ValueError):
        return {}


@dataclass
class EventTail:
    """Reads events.jsonl as it grows. A half-written last line is "not yet"; a damaged one is counted and left out."""

    path: Path
    offset: int = 0
    damaged: int = 0
    _partial: bytes = field(default=b"", repr=False)

    def read(self) -> list[dict[str, Any]]:
        """The events that are new since the last call; a file that shrank is read from its start."""
        try:
            with open(self.path, "rb") as file:
                if os.fstat(file.fileno()).st_size < self.offset:
                    self.offset, self._partial = 0, b""
                file.seek(self.offset)
                data = file.read()
        except OSError:
            return []
        self.offset += len(data)
        return self.feed(data)

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """The events that these bytes complete; `data` may come over any channel."""
        *lines, self._partial = (self._partial + data).split(b"\n")
        events = []
        for line in lines:
            try:
                event = json.loads(line)
                if not isinstance(event, dict) or "kind" not in event:
                    raise ValueError
                events.append(event)
            except ValueError:
                self.damaged += bool(line.strip())
        return events

    @property
    def pending(self) -> int:
        """Bytes of the half-written last line."""
        return len(self._partial)


def state_of(folder: Path, finished: dict[str, Any] | None = None) -> str:
    """starting | running | finished | failed | stopped | died | unknown, derived from the folder and the process."""
    folder = Path(folder)
    finished = finished or finished_event(folder)
    if finished:
        return str(finished.get("state", "finished"))
    info = read_run_json(folder)
    if not info or info.get("host") not in (None, platform.node()):
        return "unknown"
    if info.get("pid"):
        if process_identity(info["pid"]) == info.get("identity"):
            return "running"
        finished = finished_event(folder)  # again: it may have ended between the two looks
        return str(finished.get("state", "finished")) if finished else "died"
    return "starting" if time.time() - info.get("started", 0) < STARTING_GRACE_S else "died"


def finished_event(folder: Path) -> dict[str, Any] | None:
    """How the run ended; None while it has not."""
    return next((e for e in _last_events(folder, b'"finished"') if e.get("kind") == "finished"), None)


def _last_events(folder: Path, holding: bytes) -> Iterator[dict[str, Any]]:
    """Events of the last 64 KiB whose line holds some text, the newest first."""
    try:
        with open(folder / "events.jsonl", "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - 65536))
            lines = file.read().split(b"\n")
    except OSError:
        return
    for line in reversed(lines):
        if holding in line:
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict):
                    yield event


@dataclass(frozen=True)
class RunSummary:
    """One row of the run list."""

    id: str
    command: str
    state: str
    started: float
    steps: int
    host: str
    name: str
    folder: Path

    def data(self) -> dict[str, Any]:
        """The row as JSON keys."""
        return {**vars(self), "folder": str(self.folder)}


def list_runs(runs_dir: Path) -> list[RunSummary]:
    """Every run of a workspace, newest first."""
    found = [summary(folder) for folder in (Path(runs_dir).iterdir() if Path(runs_dir).is_dir() else [])]
    return newest_first(run for run in found if run)


def newest_first(found: Iterable[RunSummary]) -> list[RunSummary]:
    """The order of every run list."""
    return sorted(found, key=lambda run: (run.started, run.id), reverse=True)


def summary(folder: Path) -> RunSummary | None:
    """One run's row; None for a folder that is no run."""
    info = read_run_json(folder)
    if not info:
        return None
    return RunSummary(
        info.get("id", folder.name),
        info.get("command", "?"),
        state_of(folder),
        info.get("started", 0.0),
        last_step(folder),
        info.get("host", "?"),
        run_name(info),
        folder,
    )


def run_name(info: dict[str, Any]) -> str:
    """The name that the user gave to a run, or ''."""
    named = (info.get("options") or {}).get("run_name") or {}
    return str(named.get("value") or "")


def last_step(folder: Path) -> int:
    """The last optimiser step that the run reported, 0 for a job that has none; read from the end of the file."""
    return next((e["step"] for e in _last_events(folder, b'"step"') if isinstance(e.get("step"), int)), 0)


def find_run(name: str, runs_dirs: list[Path], command: str | None = None) -> Path:
    """The run folder that `name` means: a folder, an id, the beginning of an id, a run name, or `last`.

    `last` is the newest run, of `command` where one is given and has any. Raises UsageError when nothing or more than
    one thing fits.
    """
    if (Path(name) / "run.json").is_file():
        return Path(name).resolve()
    runs = sorted((r for d in runs_dirs for r in list_runs(d)), key=lambda r: r.started, reverse=True)
    if not runs:
        raise UsageError(f"{name}: no runs in {', '.join(map(str, runs_dirs))}")
    if name == "last":
        return next((r for r in runs if r.command == command), runs[0]).folder
    exact = [r for r in runs if r.id == name] or [r for r in runs if r.name == name][:1]
    matches = exact or [r for r in runs if r.id.startswith(name)]
    if len(matches) == 1:
        return matches[0].folder
    if matches:
        raise UsageError(
            f"{name}: fits {len(matches)} runs ({', '.join(r.id for r in matches[:3])}, …); give more of the id"
        )
    raise UsageError(f"{name}: no such run in {', '.join(map(str, runs_dirs))} (surgvqa runs lists them)")


def follow_events(folder: Path, poll_s: float = 0.2) -> Iterator[dict[str, Any]]:
    """Events as they come, until the run has ended (or died)."""
    tail = EventTail(folder / "events.jsonl")
    while True:
        ended = state_of(folder) not in ("starting", "running")
        for event in tail.read():
            yield event
            if event["kind"] == "finished":
                return
        if ended:
            return
        time.sleep(poll_s)
