"""What the screens share: where jobs run, what is known of it, and the settings that hold on every screen."""

from __future__ import annotations

from pathlib import Path

from presets import load_presets
from surgvqa.config.options import BUDGET_GB
from surgvqa.runs.history import RunSummary
from tui.targets.host import HostTarget
from tui.targets.local import LocalTarget
from tui.targets.target import Target
from tui.targets.threads import in_thread


class Session:
    """One target is chosen: this machine, or one of the hosts. Merging and uploading are always done here."""

    def __init__(self, here: LocalTarget, host: str | None = None) -> None:
        self.here = here
        self.hosts: dict[str, HostTarget] = {}
        """Those that were chosen once; their connections are kept."""
        self.target: Target = here
        self.listed: list[RunSummary] = []
        """The target's runs, newest first."""
        self.listed_here: list[RunSummary] = []
        self.edited: dict[str, dict[str, str]] = {}
        """What was typed on each screen and is nowhere else, by command."""
        self.checkpoint: Path | None = None
        """Merged here, and not the one that surgvqa.toml names."""
        self.job_starts = False
        """While a job is being started."""
        names = [p.name for p in load_presets(here.workspace.root)]
        self.preset: str | None = here.workspace.preset or (names[0] if names else None)
        if host:
            self.choose(host)

    @property
    def host(self) -> HostTarget | None:
        """The host that is chosen; None while this machine is."""
        return self.target if isinstance(self.target, HostTarget) else None

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
                self.hosts[name] = HostTarget(name, self.here.workspace)
            self.target = host = self.hosts[name]
            if host.connection.kind in ("refused", "unreachable"):
                host.link.again()
        self.listed = self.listed_here if self.host is None else self.host.runs()  # never another machine's, for a tick

    async def refresh_runs(self) -> bool:
        """Reads the run lists anew; whether they changed."""
        here = await in_thread(self.here.runs)
        listed = here if self.host is None else self.host.runs()
        changed = (here, listed) != (self.listed_here, self.listed)
        self.listed_here, self.listed = here, listed
        return changed

    def end(self) -> None:
        """Ends the connections."""
        for host in self.hosts.values():
            host.end()
