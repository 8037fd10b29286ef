"""A GPU host as the panel's target: remote's own launch, follow, stop, plan and fetch, over one shared connection."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from remote.jobs import launch as launch_module
from remote.jobs.fetch import fetch_run
from remote.setup import skew
from remote.upload.command import check
from remote.upload.hashes import Hashes, Item
from remote.upload.options import UploadOptions
from remote.upload.plan import checkpoint_ways, compare, data_sources
from surgvqa.config.settings import Path_
from surgvqa.config.workspace import Workspace
from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.runs.history import RunSummary
from tui.targets.connection_state import ConnectionState
from tui.targets.host_feed import HostFeed
from tui.targets.link import Link
from tui.targets.target import ACTIVE
from tui.targets.threads import LineReporter, in_thread


class HostTarget:
    """A host of ~/.ssh/config or hosts.toml. Its connection is sought from the beginning and kept."""

    def __init__(self, name: str, workspace: Workspace) -> None:
        self.name, self.workspace = name, workspace
        self.link = Link(name, workspace.root)
        self.warning = ""
        """What the last launch warned of."""

    @property
    def connection(self) -> ConnectionState:
        return self.link.connection

    @property
    def price_per_hour(self) -> float | None:
        return self.link.host.entry.price_per_hour if self.link.host else None

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
        state = str(launch_module.stop(self.link, run_id)["state"])  # type: ignore[arg-type]  # a Link asks as a Remote does
        self.link.look()
        return state

    async def launch(self, *argv: str, share: bool = False) -> str:
        return await in_thread(self._launch, list(argv), share)

    async def resume(self, run_id: str, *changes: str, share: bool = False) -> str:
        return await in_thread(self._resume, run_id, list(changes), share)

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
        remote: Any = self.link  # it asks as a Remote does
        launched = launch_module.launch(remote, command, argv, needs=needs, share=share)
        self.warning = launched["warning"]
        self.link.look()
        return str(launched["run"])

    def fetch(self, run_id: str, progress: LineReporter) -> dict[str, Any]:
        """Brings a run home into runs/ of the workspace here, verified; goes on where it was broken off."""
        return fetch_run(self.link, run_id, self.workspace.runs_dir, progress)  # type: ignore[arg-type]  # a Link asks as a Remote does

    def plan(self, what: str, checkpoint: Path | None, progress: LineReporter) -> dict[str, Any]:
        """What `surgvqa-remote upload --dry-run` would say: each way, its bytes and time, and what is there."""
        self.link.probe()
        options = UploadOptions(what=what, model_name_or_path=Path_(checkpoint) if checkpoint else None)
        check(options, self.workspace)
        hashes = Hashes()
        ways = checkpoint_ways(options, self.workspace, hashes, progress)
        sources = data_sources(options, self.workspace)
        progress.phase("hash", "the data")
        entries = hashes.entries(sources, lambda done, total: progress.progress("hash", done, total, "bytes"))
        data = [Item("data", "files", entries)] if sources else []
        progress.phase("ask", f"what {self.name} has")
        return compare(self.link, ways, data)  # type: ignore[arg-type]  # a Link asks as a Remote does

    def end(self) -> None:
        """Closes the connection; jobs there go on."""
        self.link.end()
