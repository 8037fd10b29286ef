"""The run folder: everything that a job and its watchers share.

    runs/<run id>/run.json       what was asked for (atomic, written once when the job starts)
                 events.jsonl    append-only, one JSON object a line: {"v":1,"t":<unix s>,"kind":…,…}
                 log.txt         the process's own stdout and stderr
                 …               what the job makes

Event kinds and their fields:

    phase       name, text
    progress    phase, done, total, unit            (readers derive rate and time left)
                                                    (merge adds shard, shard_done, shard_total)
    plan        output, output_bytes, free_bytes, shards, modules_merged, …     (merge, before it writes)
    shard       file, bytes, sha256, done, total    (merge, for each shard on disk)
    metric      step, total_steps, epoch, loss, learning_rate, grad_norm, samples_per_s, data_wait, …
                                                    (data_wait: share of the step spent waiting for data, 0..1)
                                                    (compiled layers: graphs, recompiles, … of the process so far)
    eval        step, eval_loss, …
    gpu         device, backend ("cuda" or "host"), process_bytes, allocated_bytes, reserved_bytes, used_bytes,
                total_bytes, utilization_percent, temperature_c, power_w, others (processes), other_gpus,
                problem (what NVML says of a card that is lost)
                                                    (what is unknown is absent)
    checkpoint  step, path
    preset      name, settings, step, predicted     (predicted: bytes of each component at the peak, from now on)
    oom         step, phase, text, requested_bytes, allocated_bytes, reserved_bytes, memory, predicted, action, …
    retreat     step, settings, predicted           (trades time for memory; the model's input is unchanged)
    memory      phase, peak_allocated_bytes, peak_reserved_bytes, budget_gb  (when a phase ends)
    warning     text
    error       text
    finished    state ("finished" | "failed" | "stopped"), result, exit_code

A run's state is derived, never stored: see `state_of`. Nothing here imports torch.
"""

from __future__ import annotations

import os
import platform
import secrets
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from surgvqa import __version__
from surgvqa.errors import SurgvqaError
from surgvqa.files import write_json_atomic
from surgvqa.runs.events import finite
from surgvqa.runs.process import process_identity
from surgvqa.untrusted import json_line


def new_run_id(command: str) -> str:
    """An id that sorts by start time and names the command: 20261122-163012-train-a3f."""
    return f"{datetime.now():%Y%m%d-%H%M%S}-{command}-{secrets.token_hex(2)[:3]}"


class Run:
    """A run folder as its job sees it. Thread-safe; every event is one write(2) to an O_APPEND file.

    Use as a context manager: leaving it writes the `finished` event, also after an exception.
    """

    def __init__(
        self,
        folder: Path,
        observer: Callable[[dict[str, Any]], None] | None = None,
        workspace: Path | None = None,
    ) -> None:
        self.folder = folder
        self.workspace = workspace or folder.parent.parent
        """The folder whose runs/ this run lies in; presets and the feature cache are looked for there."""
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
        workspace: Path | None = None,
    ) -> Run:
        """Makes `runs_dir`/<id>/ and its run.json. The folder may exist already: `launch` prepares it.

        Raises SurgvqaError when it cannot be written."""
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
            return cls(folder, observer, workspace)
        except OSError as error:
            raise SurgvqaError(f"{folder}: cannot write the run folder: {error.strerror}") from None

    def emit(self, kind: str, **fields: Any) -> None:
        """Appends one event. On a full disk the event is lost and the job goes on."""
        event = {"v": 1, "t": round(time.time(), 3), "kind": kind, **finite(fields)}
        line = json_line(event)
        with self._lock:
            try:
                os.write(self._events, line)
            except OSError as error:
                print(f"event not written: {error.strerror}", file=sys.stderr)
        if self.observer:
            self.observer(event)

    def phase(self, name: str, text: str = "") -> None:
        """Emits `phase`: a new part of the job begins."""
        self.emit("phase", name=name, text=text)

    def progress(
        self, phase: str, done: float, total: float | None, unit: str, every_s: float = 0.2, **fields: Any
    ) -> None:
        """Emits `progress`, at most once in `every_s` seconds for each phase; the first and the last always."""
        now = time.monotonic()
        if self._last_progress[0] == phase and now - self._last_progress[1] < every_s and done != total:
            return
        self._last_progress = (phase, now)
        self.emit("progress", phase=phase, done=done, total=total, unit=unit, **fields)

    def warning(self, text: str) -> None:
        """Emits `warning`: something that the user should know and that does not end the job."""
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
