"""The run folder: everything that a job and its readers share.

    runs/<run id>/run.json       the request and its provenance: versions, gpus, git, inputs (written atomically when
                                 the job starts, and again when its inputs are hashed)
                 events.jsonl    append-only, one JSON object per line: {"v":1,"t":<unix s>,"kind":…,…}
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
                                                    (rank_wait: per rank, share spent waiting for the slowest, 0..1)
                                                    (compiled layers: graphs, recompiles, … of the process so far)
    eval        step, eval_loss, loss_by_type {question type: loss}, …
    answers     step, samples, label_accuracy, keyword_accuracy, majority_accuracy, collapsed_types, seconds,
                by_type {question type: n, label_accuracy, labels, predicted, collapsed, …}   (shares are 0..1)
                                                    (of the evaluation samples that training answers: --eval_generate)
    gpu         device, backend ("cuda" or "host"), process_bytes, allocated_bytes, reserved_bytes, used_bytes,
                total_bytes, utilization_percent, temperature_c, power_w, others (processes), other_gpus,
                problem (what NVML reports about a card that was lost)
                                                    (unknown values are absent)
    checkpoint  step, path
    preset      name, settings, step, predicted     (predicted: bytes of each component at the peak from this step on)
    ranks       hosts                               (in a run on several machines: the machine of each rank, by name)
    oom         step, phase, text, requested_bytes, allocated_bytes, reserved_bytes, memory, predicted, action, …
    retreat     step, settings, predicted           (trades time for memory; the model's input is unchanged)
    memory      phase, peak_allocated_bytes, peak_reserved_bytes, budget_gb  (when a phase ends)
    money       cost, cost_at_end, left_s, price_per_hour     (of a rented machine, in US dollars)
    warning     text
    error       text
    finished    state ("finished" | "failed" | "stopped"), result, exit_code

In a run of several ranks (torchrun), rank 0 writes the events. The other ranks add only their own oom, gpu and memory
events, with a field `rank`. On another machine than rank 0's they write into a folder of their own, and rank 0 gets
these events too.

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
from surgvqa.files import read_json, write_json_atomic
from surgvqa.runs.events import finite
from surgvqa.runs.process import machine_id, process_identity
from surgvqa.runs.ranks import Ranks
from surgvqa.untrusted import json_line


def new_run_id(command: str, token: str = "") -> str:
    """An id that sorts by start time and names the command: 20261122-163012-train-a3f. It ends in `token` if given."""
    return f"{datetime.now():%Y%m%d-%H%M%S}-{command}-{token or secrets.token_hex(2)[:3]}"


class Run:
    """The run folder that a job writes. Thread-safe: every event is one write(2) to an O_APPEND file.

    A context manager: its exit writes the `finished` event, also after an exception.
    """

    def __init__(
        self,
        folder: Path,
        observer: Callable[[dict[str, Any]], None] | None = None,
        workspace: Path | None = None,
    ) -> None:
        self.folder = folder
        self.workspace = workspace or folder.parent.parent
        """The workspace folder, which holds presets and the feature cache."""
        self.id = folder.name
        self.observer = observer
        self.result: dict[str, Any] = {}
        self.exit_code = 0
        self.ranks = Ranks()
        """The processes that share this run."""
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
        about: dict[str, Any] | None = None,
    ) -> Run:
        """Makes `runs_dir`/<id>/ and its run.json.

        The folder may exist already, because `launch` prepares it. `about` holds further keys of run.json about the
        run's provenance. Raises SurgvqaError when the folder cannot be written.
        """
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
                    "machine": machine_id(),
                    "pid": os.getpid(),
                    "identity": process_identity(os.getpid()),
                    "started": time.time(),
                    "versions": {"surgvqa": __version__, "python": platform.python_version()},
                    **(about or {}),
                },
            )
            return cls(folder, observer, workspace)
        except OSError as error:
            raise SurgvqaError(f"{folder}: cannot write the run folder: {error.strerror}") from None

    def record(self, **about: Any) -> None:
        """Adds keys to run.json."""
        file = self.folder / "run.json"
        write_json_atomic(file, {**read_json(file), **about})

    def emit(self, kind: str, **fields: Any) -> None:
        """Appends one event. On a full disk the event is lost and the job continues."""
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
        """Emits `progress`, at most once per `every_s` seconds in each phase; always the first and the last."""
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
            self.ranks.leave("stopped")
            state, self.exit_code = "stopped", 1
        else:
            text = str(error) if isinstance(error, SurgvqaError) else f"{type(error).__name__}: {error}"
            self.ranks.leave(text)
            self.emit("error", text=text)
            state, self.exit_code = "failed", getattr(error, "exit_code", 1)
        self.emit("finished", state=state, exit_code=self.exit_code, result=self.result)
        os.close(self._events)
