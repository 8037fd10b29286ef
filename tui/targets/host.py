"""A GPU host as the panel's target: remote's own launch, follow, stop, plan and fetch, over one shared connection."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import Any

from remote.jobs import launch as launch_module
from remote.jobs.fetch import fetch
from remote.paths import inside
from remote.setup import skew
from remote.upload.command import check, checkpoint_ways, compare
from remote.upload.options import UploadOptions
from remote.upload.plan import Hashes, Item, data_sources
from surgvqa.config.options import Workspace
from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.runs.folder import RunSummary, read_run_json
from tui.targets.link import Detached, Light, Link, Port
from tui.targets.target import ACTIVE, LOG_TAIL_BYTES, LogLines, News, Result, apart, curve_events, resumed_from

SETUP_STARTS_S = 30.0


class HostTarget:
    """A host of ~/.ssh/config or hosts.toml. Its connection is sought from the beginning and kept."""

    def __init__(self, name: str, workspace: Workspace) -> None:
        self.name, self.workspace = name, workspace
        self.link = Link(name, workspace.root)
        self.warning = ""
        """What the last launch warned of."""

    @property
    def light(self) -> Light:
        return self.link.light

    @property
    def skew(self) -> str:
        """One line when the host has no or another version of us; ''. A venv of the user's own is theirs to keep."""
        host = self.link.host
        if not self.link.facts or host is None or os.path.isabs(host.entry.venv):
            return ""
        return (skew(self.link.facts["installed"]) or "").partition(";")[0]

    def runs(self) -> list[RunSummary]:
        return self.link.listed or []

    def feed(self, run_id: str) -> HostFeed:
        return HostFeed(self.link, run_id)

    def stop(self, run_id: str) -> str:
        state = str(launch_module.stop(self.link, run_id)["state"])  # type: ignore[arg-type]
        self.link.look()
        return state

    async def launch(self, *argv: str, share: bool = False) -> str:
        return await apart(self._launch, list(argv), share)

    async def resume(self, run_id: str, *changes: str, share: bool = False) -> str:
        return await apart(self._resume, run_id, list(changes), share)

    def _launch(self, argv: list[str], share: bool) -> str:
        command, *rest = argv
        rest, needs = launch_module.paths_for_host(command, rest, self.workspace)
        return self._start(command, rest, needs, share)

    def _resume(self, run_id: str, changes: list[str], share: bool) -> str:
        found = self.link.call("runs", run=run_id)
        if found["state"] in ACTIVE:
            raise SurgvqaError(f"{found['id']} is {found['state']}; nothing to resume")
        command, *argv = found["run"].get("argv") or ["?"]
        if command != "train":
            raise UsageError(f"{found['id']}: a {command} run cannot be resumed, only train")
        return self._start("train", launch_module.resume_argv([*argv, *changes], found["id"]), [], share)

    def _start(self, command: str, argv: list[str], needs: list[str], share: bool) -> str:
        if self.skew:
            raise SurgvqaError(f"{self.name}: {self.skew}; v sets it up")
        launched = launch_module.launch(self.link, command, argv, needs=needs, share=share)  # type: ignore[arg-type]
        self.warning = launched["warning"]
        self.link.look()
        return str(launched["run"])

    def fetch(self, run_id: str, progress: Progress) -> dict[str, Any]:
        """Brings a run home into runs/ of the workspace here, verified; goes on where it was broken off."""
        found = self.link.call("runs", run=run_id)
        parts = []
        for folder in found["folders"]:
            name = folder.removeprefix("runs/") if folder.startswith("runs/") else inside(folder)
            target = self.workspace.runs_dir / name
            target.mkdir(parents=True, exist_ok=True)
            parts.append(fetch(self.link, folder, target, progress))  # type: ignore[arg-type]
        return {"folders": [p["folder"] for p in parts], "files": sum(p["files"] for p in parts)}

    def plan(self, what: str, progress: Progress) -> dict[str, Any]:
        """What `surgvqa-remote upload --dry-run` would say: each way, its bytes and time, and what is there."""
        self.link.probe()
        options = UploadOptions(what=what)
        check(options, self.workspace)
        hashes = Hashes()
        ways = checkpoint_ways(options, self.workspace, hashes, progress)  # type: ignore[arg-type]
        sources = data_sources(options, self.workspace)
        progress.phase("hash", "the data")
        entries = hashes.entries(sources, lambda done, total: progress.progress("hash", done, total, "bytes"))
        data = [Item("data", "files", entries)] if sources else []
        progress.phase("ask", f"what {self.name} has")
        return compare(self.link, ways, data)  # type: ignore[arg-type]

    async def set_up(self) -> str:
        """Starts `surgvqa-remote setup` as a process of its own; its run id here. Raises with its own line."""
        words = [sys.executable, "-m", "remote", "setup", self.name, "--workspace", str(self.workspace.root)]
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                words,
                cwd=self.workspace.root,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,
                env={**os.environ, "SURGVQA_DETACHED": "1"},
            )
            for _ in range(int(SETUP_STARTS_S / 0.1)):
                for folder in self.workspace.runs_dir.glob("*-setup-*"):
                    if read_run_json(folder).get("pid") == process.pid:
                        return folder.name
                if process.poll() is not None:
                    break
                await asyncio.sleep(0.1)
            errors.seek(0)
            said = errors.read().decode("utf-8", "replace").strip().splitlines()
        raise SurgvqaError(said[-1] if said else f"setup of {self.name} did not start")

    def end(self) -> None:
        """Closes the connection; jobs there go on."""
        self.link.end()


class Progress:
    """What remote's planner and fetch tell of themselves, as one line; they end when it is not `wanted` any more."""

    def __init__(self) -> None:
        self.text, self.share, self.wanted = "", None, True

    @property
    def line(self) -> str:
        return self.text if self.share is None else f"{self.text}  {100 * self.share:.0f} %"

    def phase(self, name: str, text: str = "") -> None:
        self._tell(f"{name}  {text}", None)

    def progress(self, phase: str, done: float, total: float, unit: str, **_: Any) -> None:
        self._tell(self.text, done / total if total else None)

    def warning(self, text: str) -> None:
        self._tell(text, None)

    def _tell(self, text: str, share: float | None) -> None:
        if not self.wanted:
            raise Detached("not wanted any more")
        self.text, self.share = text, share


async def watched(work: Callable[[Progress], Result], show: Callable[[str], object]) -> Result:
    """Runs `work` in a thread of its own and shows meanwhile how far it is; cancelled, it ends soon."""
    progress = Progress()
    working = asyncio.ensure_future(apart(work, progress))
    try:
        while not (await asyncio.wait({working}, timeout=0.3))[0]:
            show(progress.line)
    finally:
        progress.wanted = False
    return working.result()


class HostFeed:
    """remote's Follower of one run, in a thread of its own; `read` hands on what it has heard and never waits."""

    def __init__(self, link: Link, run_id: str) -> None:
        self.link, self.run_id = link, run_id
        self._port = Port(link)
        self._lock = threading.Lock()
        self._info: dict[str, Any] = {}
        self._state = next((r.state for r in link.listed or () if r.id == run_id), "starting")
        self._earlier: list[dict[str, Any]] = []
        self._events: list[dict[str, Any]] = []
        self._lines: list[str] = []
        threading.Thread(target=self._run, name=f"follow {run_id}", daemon=True).start()

    def read(self) -> News:
        with self._lock:
            news = News(self._info, self._state, self._earlier, self._events, self._lines)
            self._earlier, self._events, self._lines = [], [], []
        return news

    def close(self) -> None:
        self._port.detach()

    # --- its own thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._learn()
            log = LogLines()
            follower = launch_module.Follower(self._port, self.run_id, {"log.txt": self._log_size() or 0})  # type: ignore[arg-type]
            for event in follower:
                if event["kind"] in ("connection", "log"):
                    lines = log.feed(event["text"].encode()) if event["kind"] == "log" else []
                    with self._lock:
                        self._lines += lines
                    continue
                if not self._info.get("pid"):
                    self._learn()
                with self._lock:
                    if event["kind"] == "state":
                        self._state = event["state"]
                    else:
                        self._events.append(self._in_our_time(event))
            self.link.look()
        except Detached:
            return
        except SurgvqaError as error:
            with self._lock:
                self._state = "unknown"
                self._lines.append(str(error))

    def _learn(self) -> None:
        """run.json, once the job has written its own; with it what the runs before this one said."""
        info = self._run_json(self.run_id)[0]
        earlier = self._read_earlier(info) if info.get("pid") else []
        with self._lock:
            self._info, self._earlier = info, earlier

    def _run_json(self, run_id: str) -> tuple[dict[str, Any], str]:
        answer = self._port.call("runs", run=run_id)
        info = answer["run"]
        if "started" in info:
            info["started"] -= self.link.ahead_s
        return info, answer["state"]

    def _read_earlier(self, info: dict[str, Any]) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        known = {run.id for run in self.link.listed or ()} - {self.run_id}
        while parent := next((name for name in resumed_from(info) if name in known), None):
            known.discard(parent)
            info, state = self._run_json(parent)
            if state in ACTIVE:
                break
            follower = launch_module.Follower(self._port, parent, {"log.txt": self._log_size(parent, tail=0)})  # type: ignore[arg-type]
            events = [self._in_our_time(e) for e in curve_events(list(follower))] + events
        return events

    def _log_size(self, run_id: str | None = None, tail: int = LOG_TAIL_BYTES) -> int:
        """Where the last `tail` bytes of the log begin."""
        files = self._port.call("listing", folder=f"runs/{run_id or self.run_id}")["files"]
        return max(0, next((size for path, size, _ in files if path == "log.txt"), 0) - tail)

    def _in_our_time(self, event: dict[str, Any]) -> dict[str, Any]:
        if self.link.ahead_s and "t" in event:
            event["t"] -= self.link.ahead_s
        return event
