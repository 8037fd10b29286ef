"""This machine as a target."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgvqa.config.workspace import Workspace
from surgvqa.errors import SurgvqaError
from surgvqa.files import open_regular
from surgvqa.runs import history
from surgvqa.runs import launch as launch_module
from surgvqa.runs.events import EventTail
from surgvqa.runs.history import RunSummary
from surgvqa.runs.state import STARTING_GRACE_S, check_run_json, read_run_json, state_of
from tui.targets.run_files import LOG_TAIL_BYTES, LogLines, curve_events, resumed_from
from tui.targets.target import ACTIVE, RunUpdate

PROGRAMS = {"surgvqa": "surgvqa", "remote": "surgvqa-remote"}
"""The name of a module's command line, with which its errors begin."""


@dataclass(frozen=True)
class Answer:
    """What a short command said."""

    ok: bool
    data: dict[str, Any]
    error: str
    """Its one line on stderr, without the program's name; '' when there was none."""


@dataclass
class LocalFeed:
    """Tails events.jsonl and log.txt of a run folder."""

    folder: Path
    events: EventTail = field(init=False)
    log_offset: int | None = None
    _log: LogLines = field(default_factory=LogLines)
    _earlier_read: bool = False

    def __post_init__(self) -> None:
        self.events = EventTail(self.folder / "events.jsonl")

    def read(self) -> RunUpdate:
        # The state first: whatever an ended job said is then surely in what is read after it.
        (info, run_json_problem), state = check_run_json(self.folder), state_of(self.folder)
        if not info and self.folder.is_dir():  # a detached upload makes its folder first
            state = "starting" if time.time() - self.folder.stat().st_mtime < STARTING_GRACE_S else "died"
        problem = "" if self.folder.is_dir() else self._gone(state)
        earlier: list[dict[str, Any]] = []
        if not self._earlier_read and info.get("pid"):
            self._earlier_read, earlier = True, self._read_earlier(info)
        events = self.events.read_some()
        damage = f"events.jsonl: {self.events.problems[0]}" if self.events.problems else run_json_problem
        lines = [] if self.events.more else self._read_log()
        return RunUpdate(info, state, earlier, events, lines, problem, damage, self.events.more)

    def _gone(self, state: str) -> str:
        then = "its job runs on without it" if state in ACTIVE else "what was read of it is still shown"
        return f"{self.folder}: the run folder is gone; {then}"

    def close(self) -> None:
        """Nothing is held open."""

    def _read_earlier(self, info: dict[str, Any]) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        seen = {info.get("id")}
        while info:
            known = (part for part in resumed_from(info) if part not in seen)
            parent = next((p for p in known if read_run_json(self.folder.parent / p)), None)
            if parent is None:
                break
            seen.add(parent)
            folder = self.folder.parent / parent
            events = curve_events(EventTail(folder / "events.jsonl").read()) + events
            info = read_run_json(folder)
        return events

    def _read_log(self) -> list[str]:
        try:
            with open_regular(self.folder / "log.txt") as file:
                size = os.fstat(file.fileno()).st_size
                if self.log_offset is None or size < self.log_offset:
                    self.log_offset, self._log = max(0, size - LOG_TAIL_BYTES), LogLines()
                if size == self.log_offset:
                    return []
                file.seek(self.log_offset)
                data = file.read()
        except OSError:
            return []
        self.log_offset += len(data)
        return self._log.feed(data)


class LocalTarget:
    """This machine."""

    name = "this machine"
    connection = None
    price_per_hour = None

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self._ended: dict[tuple[str, object], RunSummary] = {}
        """Runs that are over, by name and the stamps of their files: they are not read again each second."""

    def folder(self, run_id: str) -> Path:
        """A run's folder."""
        return self.workspace.runs_dir / run_id

    def runs(self) -> list[RunSummary]:
        known, self._ended = self._ended, {}
        found = []
        for folder in self.workspace.runs_dir.iterdir() if self.workspace.runs_dir.is_dir() else []:
            stamp = (_stamp(folder / "run.json"), _stamp(folder / "events.jsonl"))
            run = known.get((folder.name, stamp)) or history.summary(folder)
            if run:
                found.append(run)
                if run.state not in ACTIVE:
                    self._ended[folder.name, stamp] = run
        return history.newest_first(found)

    def feed(self, run_id: str) -> LocalFeed:
        return LocalFeed(self.folder(run_id))

    def stop(self, run_id: str) -> str:
        return launch_module.stop(self.folder(run_id))

    def document(self, path: str) -> dict[str, Any]:
        """A JSON file that a job wrote; {} when it is not there."""
        try:
            document = json.loads(Path(self.workspace.root, path).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return document if isinstance(document, dict) else {}

    async def command(self, *argv: str, module: str = "surgvqa") -> Answer:
        """Runs a short command with --json."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            module,
            *argv,
            "--json",
            "--workspace",
            str(self.workspace.root),
            cwd=self.workspace.root,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
        try:
            data = json.loads(out)
        except ValueError:
            data = {}
        lines = [line for line in err.decode("utf-8", "replace").splitlines() if line.strip()]
        error = lines[-1].removeprefix(f"{PROGRAMS[module]} {argv[0]}: ") if lines and process.returncode else ""
        return Answer(process.returncode == 0, data if isinstance(data, dict) else {}, error)

    async def launch(self, *argv: str, share: bool = False, module: str = "surgvqa") -> str:
        answer = await self.command(*argv, "--detach", module=module)
        if not answer.ok or "run" not in answer.data:
            raise SurgvqaError(answer.error or f"{PROGRAMS[module]} {argv[0]} did not start and did not say why")
        return str(answer.data["run"])

    async def resume(self, run_id: str, *changes: str, share: bool = False) -> str:
        return await self.launch("train", "--resume", run_id, *changes, share=share)


def _stamp(file: Path) -> tuple[int, int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size
