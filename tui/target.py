"""Where work is done: this machine now, a GPU host later. The screens know a `Target` and nothing of what is behind it.

Jobs are started by the command line itself (`surgvqa train … --detach`), so that the panel and a terminal refuse the
same input with the same words, and a job is never the panel's child.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from surgvqa import runs
from surgvqa.config import Workspace
from surgvqa.errors import SurgvqaError
from surgvqa.runs import RunSummary
from tui.follow import ACTIVE

LOG_TAIL_BYTES = 256 * 1024


@dataclass(frozen=True)
class Answer:
    """What a short command said."""

    ok: bool
    data: dict[str, Any]
    error: str
    """Its one line on stderr, without the program's name; '' when there was none."""


class Feed(Protocol):
    """What is new in a run since the last call. May block on a file or a network: call it in a thread."""

    def read(self) -> tuple[list[dict[str, Any]], list[str]]:
        """New events and new lines of the log."""
        ...


class Target(Protocol):
    """A machine with a workspace. Methods that are not async may block: call them in a thread."""

    name: str
    workspace: Workspace

    def runs(self) -> list[RunSummary]:
        """All runs, newest first."""
        ...

    def info(self, run_id: str) -> dict[str, Any]:
        """run.json of a run."""
        ...

    def state(self, run_id: str) -> str:
        """starting, running, finished, failed, stopped, died or unknown."""
        ...

    def feed(self, run_id: str) -> Feed:
        """Follows a run from its first event and the end of its log."""
        ...

    def stop(self, run_id: str) -> str:
        """Ends a run (up to 30 s) and returns its state."""
        ...

    def document(self, path: str) -> dict[str, Any]:
        """A JSON file that a job wrote; {} when it is not there."""
        ...

    async def command(self, *argv: str) -> Answer:
        """Runs a short command with --json."""
        ...

    async def launch(self, *argv: str) -> str:
        """Starts a job and returns its run id; raises SurgvqaError with the command's own line."""
        ...


@dataclass
class LocalFeed:
    """Tails events.jsonl and log.txt of a run folder."""

    folder: Path
    events: runs.EventTail = field(init=False)
    log_offset: int | None = None
    _partial: bytes = b""

    def __post_init__(self) -> None:
        self.events = runs.EventTail(self.folder / "events.jsonl")

    def read(self) -> tuple[list[dict[str, Any]], list[str]]:
        return self.events.read(), self._read_log()

    def _read_log(self) -> list[str]:
        try:
            with open(self.folder / "log.txt", "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if self.log_offset is None or size < self.log_offset:
                    self.log_offset, self._partial = max(0, size - LOG_TAIL_BYTES), b""
                if size == self.log_offset:
                    return []
                file.seek(self.log_offset)
                data = file.read()
        except OSError:
            return []
        self.log_offset += len(data)
        *lines, self._partial = (self._partial + data).split(b"\n")
        # A progress bar redraws its line with \r: what stands there in the end is the line.
        return [line.rstrip(b"\r").rsplit(b"\r", 1)[-1].decode("utf-8", "replace") for line in lines]


class LocalTarget:
    """This machine."""

    name = "this machine"

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
            run = known.get((folder.name, stamp)) or runs.summary(folder)
            if run:
                found.append(run)
                if run.state not in ACTIVE:
                    self._ended[folder.name, stamp] = run
        return runs.newest_first(found)

    def info(self, run_id: str) -> dict[str, Any]:
        return runs.read_run_json(self.folder(run_id))

    def state(self, run_id: str) -> str:
        return runs.state_of(self.folder(run_id))

    def feed(self, run_id: str) -> LocalFeed:
        return LocalFeed(self.folder(run_id))

    def stop(self, run_id: str) -> str:
        return runs.stop(self.folder(run_id))

    def document(self, path: str) -> dict[str, Any]:
        try:
            document = json.loads(Path(self.workspace.root, path).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return document if isinstance(document, dict) else {}

    async def command(self, *argv: str) -> Answer:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "surgvqa",
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
        error = lines[-1].removeprefix(f"surgvqa {argv[0]}: ") if lines and process.returncode else ""
        return Answer(process.returncode == 0, data if isinstance(data, dict) else {}, error)

    async def launch(self, *argv: str) -> str:
        answer = await self.command(*argv, "--detach")
        if not answer.ok or "run" not in answer.data:
            raise SurgvqaError(answer.error or f"surgvqa {argv[0]} did not start and did not say why")
        return str(answer.data["run"])


def _stamp(file: Path) -> tuple[int, int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def newest_running(listed: list[RunSummary], command: str | None = None) -> RunSummary | None:
    """The newest run that is still going, of one command or of any."""
    return next((r for r in listed if r.state in ACTIVE and command in (None, r.command)), None)
