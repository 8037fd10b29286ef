"""What the screens share: where jobs run, what is known of it, and the settings that hold on every screen."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from presets import load_presets
from surgvqa.config.options import BUDGET_GB
from surgvqa.errors import SurgvqaError
from surgvqa.runs.history import RunSummary
from tui.follow.follower import Follower
from tui.targets.local import LocalTarget
from tui.targets.rented import Rented, rented
from tui.targets.target import ACTIVE, Target
from tui.targets.threads import in_thread

if TYPE_CHECKING:
    from tui.targets.host import HostTarget

FOR_A_HOST = ("rent", "setup", "upload", "launch", "end")
"""Jobs here that work for a host."""
WATCHED = 4
"""Running jobs that are followed at the same time for what there is to tell."""


class Session:
    """One target is chosen: this machine, or one of the hosts. Merging and uploading are always done here."""

    def __init__(self, here: LocalTarget, host: str | None = None) -> None:
        self.here = here
        self.hosts: dict[str, HostTarget] = {}
        """Those that were chosen once; their connections are kept."""
        self.target: Target = here
        self.listed: list[RunSummary] = []
        """The target's runs, newest first."""
        self.silent: set[str] = set()
        """Those of them that should be running and have written nothing for a while."""
        self.listed_here: list[RunSummary] = []
        self.edited: dict[str, dict[str, str]] = {}
        """What was typed on each screen and is nowhere else, by command."""
        self.checkpoint: Path | None = None
        """Merged here, and not the one that surgvqa.toml names."""
        self.followers: dict[tuple[str, str], Follower] = {}
        """What is followed, by machine and run: the screens and the news look at the same."""
        self.rented: list[Rented] = []
        self._ended: list[Rented] = []
        self.renting = ""
        """The name of the machine that is rented for the whole way and not yet followed on Monitor."""
        self.job_starts = False
        """While a job is being started."""
        names = [p.name for p in load_presets(here.workspace.root)]
        self.preset: str | None = here.workspace.preset or (names[0] if names else None)
        if host:
            self.choose(host)

    @property
    def host(self) -> HostTarget | None:
        """The host that is chosen; None while this machine is."""
        chosen = self.hosts.get(self.target.name)
        return chosen if chosen is self.target else None

    def merged(self, output: Path) -> None:
        """Train, its prediction and Upload take the checkpoint that was just merged, if it is another than theirs."""
        workspace = self.here.workspace
        known = workspace.value("model_name_or_path", "train")
        if known is None or Path(known).resolve() != output.resolve():
            self.checkpoint = output
            self.edited.setdefault("train", {})["model_name_or_path"] = str(
                output.relative_to(workspace.root) if output.is_relative_to(workspace.root) else output
            )
        elif self.checkpoint is not None:
            self.checkpoint = None
            self.edited.get("train", {}).pop("model_name_or_path", None)

    def follow(self, target: Target, run_id: str) -> Follower:
        """The run as it is followed already, or from its first event."""
        follower = self.followers.get((target.name, run_id))
        if follower is None or follower.target is not target:
            follower = self.followers[target.name, run_id] = Follower(target, run_id)
        return follower

    def forget(self, follower: Follower) -> None:
        """Nobody looks at it any more."""
        follower.feed.close()
        self.followers.pop((follower.target.name, follower.run_id), None)

    def shown_runs(self) -> list[RunSummary]:
        """The target's runs, newest first; state "silent" for a running one that has written nothing for a while."""
        return [replace(run, state="silent") if run.id in self.silent else run for run in self.listed]

    def working(self) -> list[Follower]:
        """The newest runs that are going, and those followed until now whose end was not seen."""
        going = [self.follow(self.target, run.id) for run in self.listed if run.state in ACTIVE][:WATCHED]
        if self.host is not None:
            going += [self.follow(self.here, run.id) for run in self.listed_here if run.state in ACTIVE][:WATCHED]
        return going + [f for f in self.followers.values() if f.active and f not in going]

    @property
    def budget_gb(self) -> float:
        """The budget that training would have: surgvqa.toml's or the default."""
        value = self.here.workspace.value("budget_gb", "train")
        return BUDGET_GB if value is None else float(value)

    def choose(self, name: str) -> None:
        """Makes this machine or a host the target; a host that was given up is sought again."""
        if name == self.here.name:
            self.target = self.here
        else:
            if name not in self.hosts:
                from tui.targets.host import HostTarget  # only now: it brings all that an upload needs

                self.hosts[name] = HostTarget(name, self.here.workspace)
            self.target = host = self.hosts[name]
            if host.connection.kind in ("refused", "unreachable"):
                host.link.again()
        self.listed = self.listed_here if self.host is None else self.host.runs()  # never another machine's, for a tick

    async def refresh_runs(self) -> bool:
        """Reads the run lists again. Returns whether they changed, or which runs are silent."""
        here = await in_thread(self.here.runs)
        with contextlib.suppress(SurgvqaError, OSError):  # surgvqa-remote rented says what is wrong
            before, self.rented = self.rented, await in_thread(rented)
            names = [one.name for one in self.rented]
            self._ended += [one for one in before if one.name not in names]
        listed = here if self.host is None else self.host.runs()
        silent = {run for (place, run), one in self.followers.items() if place == self.target.name and one.silent_s}
        changed = (here, listed, silent) != (self.listed_here, self.listed, self.silent)
        self.listed_here, self.listed, self.silent = here, listed, silent
        return changed

    def take_ended(self) -> list[Rented]:
        """Machines that have ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def rented_host(self) -> Rented | None:
        """The chosen host, when it is rented from here."""
        return next((one for one in self.rented if self.host and one.name == self.host.name), None)

    def idle(self) -> bool:
        """Whether the chosen host is rented, and nothing is done there or for it. Of other hosts it is not known."""
        one, host = self.rented_host(), self.host
        if one is None or host is None or host.connection.kind != "connected" or host.link.listed is None:
            return False
        busy_here = any(run.state in ACTIVE and run.command in FOR_A_HOST for run in self.listed_here)
        return not busy_here and not any(run.state in ACTIVE for run in self.listed)

    def end(self) -> None:
        """Ends the connections."""
        for host in self.hosts.values():
            host.end()
