"""Where work is done: this machine, or a GPU host (tui/host.py). The screens know a `Target`, not what is behind it.

Jobs are started by the command line itself (`surgvqa train … --detach`), so that the panel and a terminal refuse the
same input with the same words, and a job is never the panel's child.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from surgvqa.config.options import Workspace
from surgvqa.errors import SurgvqaError
from surgvqa.runs import folder as folder_module
from surgvqa.runs.folder import RunSummary

if TYPE_CHECKING:
    from tui.targets.link import Light

ACTIVE = ("starting", "running")
LOG_TAIL_BYTES = 256 * 1024
PROGRAMS = {"surgvqa": "surgvqa", "remote": "surgvqa-remote"}
"""The name of a module's command line, with which its errors begin."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Answer:
    """What a short command said."""

    ok: bool
    data: dict[str, Any]
    error: str
    """Its one line on stderr, without the program's name; '' when there was none."""


@dataclass(frozen=True)
class News:
    """What is known of a run, and what is new in it since the last look."""

    info: dict[str, Any]
    """run.json."""
    state: str
    """starting, running, finished, failed, stopped, died or unknown."""
    earlier: list[dict[str, Any]]
    """Once, before the first events: `metric` and `eval` of the runs that this one goes on from, the oldest first."""
    events: list[dict[str, Any]]
    lines: list[str]
    """Of the log."""


class Feed(Protocol):
    """One run, followed from its first event and the end of its log."""

    def read(self) -> News:
        """What is new since the last call. May read files: call it in a thread."""
        ...

    def close(self) -> None:
        """Nobody reads any more."""
        ...


class Target(Protocol):
    """A machine on which jobs run. Methods that are not async may block: call them in a thread.

    `workspace` is always the one here; a host has its own folder that `surgvqa-remote upload` fills from it.
    """

    name: str
    workspace: Workspace

    @property
    def light(self) -> Light | None:
        """How it stands with the connection; None for this machine."""
        ...

    def runs(self) -> list[RunSummary]:
        """All runs, newest first."""
        ...

    def feed(self, run_id: str) -> Feed:
        """Follows a run."""
        ...

    def stop(self, run_id: str) -> str:
        """Ends a run (up to 30 s) and returns its state."""
        ...

    async def launch(self, *argv: str, share: bool = False) -> str:
        """Starts a job and returns its run id; raises SurgvqaError with the command's own line.

        `share`: also when another job has the GPU.
        """
        ...

    async def resume(self, run_id: str, *changes: str, share: bool = False) -> str:
        """Goes on with a training from its last checkpoint, with other settings where `changes` names them."""
        ...


async def apart(work: Callable[..., Result], *arguments: Any) -> Result:
    """Runs blocking work in a thread of its own.

    Unlike `asyncio.to_thread` it takes no place in a pool that others wait for, and never holds up the panel's end.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Result] = loop.create_future()

    def settle(put: Callable[[Any], None], value: Any) -> None:
        if not future.done():
            put(value)

    def run() -> None:
        try:
            done = future.set_result, work(*arguments)
        except BaseException as error:
            done = future.set_exception, error
        with contextlib.suppress(RuntimeError):  # the panel was closed meanwhile
            loop.call_soon_threadsafe(settle, *done)

    threading.Thread(target=run, daemon=True).start()
    return await future


@dataclass
class LogLines:
    """Bytes of a log in, whole lines out."""

    _partial: bytes = b""

    def feed(self, data: bytes) -> list[str]:
        """The lines that these bytes complete."""
        *lines, self._partial = (self._partial + data).split(b"\n")
        # A progress bar redraws its line with \r: what stands there in the end is the line.
        return [line.rstrip(b"\r").rsplit(b"\r", 1)[-1].decode("utf-8", "replace") for line in lines]


@dataclass
class LocalFeed:
    """Tails events.jsonl and log.txt of a run folder."""

    folder: Path
    events: folder_module.EventTail = field(init=False)
    log_offset: int | None = None
    _log: LogLines = field(default_factory=LogLines)
    _earlier_read: bool = False

    def __post_init__(self) -> None:
        self.events = folder_module.EventTail(self.folder / "events.jsonl")

    def read(self) -> News:
        # The state first: whatever an ended job said is then surely in what is read after it.
        info, state = folder_module.read_run_json(self.folder), folder_module.state_of(self.folder)
        if not info and self.folder.is_dir():  # a detached upload makes its folder first
            state = "starting" if time.time() - self.folder.stat().st_mtime < folder_module.STARTING_GRACE_S else "died"
        earlier: list[dict[str, Any]] = []
        if not self._earlier_read and info.get("pid"):
            self._earlier_read, earlier = True, self._read_earlier(info)
        return News(info, state, earlier, self.events.read(), self._read_log())

    def close(self) -> None:
        """Nothing is held open."""

    def _read_earlier(self, info: dict[str, Any]) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        seen = {info.get("id")}
        while info:
            known = (part for part in resumed_from(info) if part not in seen)
            parent = next((p for p in known if folder_module.read_run_json(self.folder.parent / p)), None)
            if parent is None:
                break
            seen.add(parent)
            folder = self.folder.parent / parent
            events = curve_events(folder_module.EventTail(folder / "events.jsonl").read()) + events
            info = folder_module.read_run_json(folder)
        return events

    def _read_log(self) -> list[str]:
        try:
            with open(self.folder / "log.txt", "rb") as file:
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


def resumed_from(info: dict[str, Any]) -> list[str]:
    """What may be the run that this one goes on from: its name, or the parts of a path to it, innermost first."""
    resumed = ((info.get("options") or {}).get("resume") or {}).get("value")
    return list(reversed(PurePath(resumed).parts)) if resumed else []


def curve_events(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that draw the curve."""
    return [event for event in events if event["kind"] in ("metric", "eval")]


class LocalTarget:
    """This machine."""

    name = "this machine"
    light = None

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
            run = known.get((folder.name, stamp)) or folder_module.summary(folder)
            if run:
                found.append(run)
                if run.state not in ACTIVE:
                    self._ended[folder.name, stamp] = run
        return folder_module.newest_first(found)

    def feed(self, run_id: str) -> LocalFeed:
        return LocalFeed(self.folder(run_id))

    def stop(self, run_id: str) -> str:
        return folder_module.stop(self.folder(run_id))

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


def newest_running(listed: list[RunSummary], *commands: str) -> RunSummary | None:
    """The newest run that is still going, of these commands or of any."""
    return next((r for r in listed if r.state in ACTIVE and (not commands or r.command in commands)), None)
