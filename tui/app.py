"""The panel. It owns no work: jobs are processes of their own, all it shows is in their run folders."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import ClassVar

from textual.app import App, ScreenStackError, SystemCommand
from textual.binding import Binding, BindingType
from textual.events import Key
from textual.screen import Screen
from textual.widgets import Input
from textual.worker import Worker

from presets import load_presets
from surgvqa.config import options
from surgvqa.runs.history import RunSummary
from tui.dialogs.help import Help
from tui.dialogs.hosts import HostKey, HostPicker
from tui.screens.base import WIDE, PanelScreen
from tui.screens.merge import MergeScreen
from tui.screens.monitor import MonitorScreen
from tui.screens.train import TrainScreen
from tui.screens.upload import UploadScreen
from tui.targets.host import HostTarget
from tui.targets.light import Light
from tui.targets.local import LocalTarget
from tui.targets.target import Target, newest_running
from tui.targets.threads import apart
from tui.theme import THEME
from tui.widgets.form import Field
from tui.widgets.head import TITLES

REFRESH_S = 1.0


class Panel(App[None]):
    """Four screens over one target: this machine, or one of the hosts. Merging and uploading are always done here."""

    TITLE = "surgvqa"
    CSS_PATH = "panel.tcss"
    MODES = {"merge": MergeScreen, "upload": UploadScreen, "train": TrainScreen, "monitor": MonitorScreen}  # noqa: RUF012
    HORIZONTAL_BREAKPOINTS: ClassVar[list[tuple[int, str]] | None] = [(0, "-narrow"), (WIDE, "-wide")]
    BINDINGS: ClassVar[list[BindingType]] = [
        *(Binding(str(n), f"go('{mode}')", name, show=False) for n, (mode, name) in enumerate(TITLES.items(), 1)),
        Binding("h", "hosts", "host", tooltip="Choose where work is done: this machine or a GPU host"),
        Binding("question_mark", "help", "help", key_display="?"),
        Binding("ctrl+p", "command_palette", "commands", show=False),
        Binding("q", "quit", "quit"),
        Binding("ctrl+q", "quit", "quit", show=False, priority=True),
    ]

    def __init__(self, here: LocalTarget, host: str | None = None) -> None:
        super().__init__()
        self.here = here
        self.hosts: dict[str, HostTarget] = {}
        """Those that were chosen once; their connections are kept."""
        self.target: Target = here
        self.listed: list[RunSummary] = []
        """The target's runs, newest first."""
        self.listed_here: list[RunSummary] = []
        self.job_starts = False
        """While a job is being started."""
        self._seen: dict[str, Light] = {}
        """What was said of each connection."""
        if host:
            self.target = self.hosts[host] = HostTarget(host, here.workspace)
        workspace = here.workspace
        names = [p.name for p in load_presets(workspace.root)]
        self.preset: str | None = workspace.preset or (names[0] if names else None)
        self.register_theme(THEME)
        self.theme = "surgvqa"

    @property
    def budget_gb(self) -> float | None:
        """The budget that training would have: surgvqa.toml's or the default."""
        value = self.here.workspace.value("budget_gb", "train")
        return options.BUDGET_GB if value is None else float(value)

    @property
    def host(self) -> HostTarget | None:
        """The host that is chosen; None while this machine is."""
        return self.target if isinstance(self.target, HostTarget) else None

    @property
    def front(self) -> PanelScreen | None:
        """The screen that is shown; None behind a dialog and while the panel closes."""
        try:
            return self.screen if isinstance(self.screen, PanelScreen) else None
        except ScreenStackError:
            return None

    async def on_mount(self) -> None:
        await self.refresh_runs()
        await self.switch_mode(self._first_mode())
        self.set_interval(REFRESH_S, self._tick)

    def _first_mode(self) -> str:
        """Where one would go on: a running job, else the first step not done. Of a host neither is known yet."""
        if self.host or newest_running(self.listed):
            return "monitor"
        workspace = self.here.workspace
        merged = workspace.value("output_path", "merge") or workspace.value("model_name_or_path", "train")
        return "train" if merged and (Path(merged) / "config.json").is_file() else "merge"

    def _tick(self) -> None:
        self.run_worker(self._refresh, group="tick", exclusive=True, exit_on_error=False)

    async def _refresh(self) -> None:
        await self.refresh_runs()
        self.show_light()
        if self.front:
            await self.front.tick()

    def on_worker_state_changed(self, event: Worker.StateChanged) -> None:
        """An error while refreshing is said on the screen in front."""
        if self.front:
            self.front.on_worker_state_changed(event)

    async def refresh_runs(self) -> None:
        """Reads the run lists anew."""
        here = await apart(self.here.runs)
        listed = here if self.host is None else self.host.runs()
        if (here, listed) != (self.listed_here, self.listed):
            self.listed_here, self.listed = here, listed
            if self.front:
                self.front.show_where()
                self.front.keys_changed()

    def show_light(self) -> None:
        """Says once what became of the chosen host's connection; an unknown key asks."""
        host, front = self.host, self.front
        if host is None or front is None or self._seen.get(host.name) == host.light:
            return
        before, light = self._seen.get(host.name), host.light
        self._seen[host.name] = light
        front.show_where()
        front.keys_changed()
        if light.kind == "unknown key" and light.key:
            self.push_screen(HostKey(light.key), lambda yes: host.link.accept() if yes else host.link.refuse())
        elif light.kind == "refused":
            front.say(light.text, "error")
        elif light.kind == "unreachable" and (before is None or before.kind != "unreachable"):
            front.say(light.text, "warning")
        elif light.kind == "connected" and host.skew:
            front.say(f"{host.name}: {host.skew}; v sets it up", "warning")
        elif light.kind == "connected" and before and before.kind != "connecting":
            front.say(f"{host.name}: connected again", "success")
        elif light.kind in ("connecting", "connected"):
            front.say("")

    # --- what the keys do --------------------------------------------------------------------------------------------

    def on_key(self, event: Key) -> None:
        """A letter that was typed before its input had the focus reaches the panel: it is text, not `q` for quit."""
        if isinstance(self.focused, Input) and event.is_printable and event.character:
            event.prevent_default()
            self.focused.insert_text_at_cursor(event.character)

    async def action_go(self, mode: str) -> None:
        """One of the four screens."""
        if self.front:
            await self.switch_mode(mode)

    def action_hosts(self) -> None:
        """The list of hosts; the chosen one becomes the target."""
        if self.front:
            self.push_screen(HostPicker(), self._choose)

    async def _choose(self, name: str | None) -> None:
        if name is None:
            return
        if name == self.here.name:
            self.target = self.here
        else:
            if name not in self.hosts:
                self.hosts[name] = HostTarget(name, self.here.workspace)
            self.target = host = self.hosts[name]
            if host.light.kind in ("refused", "unreachable"):
                host.link.again()
            self._seen.pop(name, None)
        self.listed = self.listed_here if self.host is None else self.host.runs()  # never another machine's, for a tick
        if self.front:
            self.front.say("")
        await self.refresh_runs()
        if self.front:
            self.front.show_where()
            self.front.keys_changed()
        self._tick()

    async def set_up_host(self) -> None:
        """Installs this version of surgvqa on the host: on Upload, where its output is shown."""
        await self.switch_mode("upload")
        if isinstance(self.screen, UploadScreen):
            self.screen.set_up_host()

    def on_unmount(self) -> None:
        for host in self.hosts.values():
            host.end()

    def action_help(self) -> None:
        """All keys of this screen."""
        screen = self.front
        if screen is None:
            return
        keys = dict.fromkeys(  # keys that share a row name it once
            (self.get_key_display(active.binding), active.binding.tooltip or active.binding.description)
            for active in screen.working_keys()
            if isinstance(active.node, (PanelScreen, Panel, Field)) and active.binding.key != "ctrl+q"
        )
        self.push_screen(Help(TITLES[screen.MODE], screen.ABOUT, list(keys)))

    async def monitor(self, run_id: str) -> None:
        """Goes to Monitor and follows this run."""
        await self.refresh_runs()
        await self.switch_mode("monitor")
        if isinstance(self.screen, MonitorScreen):
            self.screen.attach(run_id)
            if self.host and self.host.warning:
                self.screen.say(self.host.warning, "warning")
                self.host.warning = ""

    def get_system_commands(self, screen: Screen) -> Iterable[SystemCommand]:
        """The palette: the screens, what this screen can do now, and Textual's own."""
        for mode, name in TITLES.items():
            yield SystemCommand(name, f"Go to {name}", partial(self.call_later, self.action_go, mode))
        for active in screen.working_keys() if isinstance(screen, PanelScreen) else ():
            binding = active.binding
            if isinstance(active.node, PanelScreen) and active.enabled:
                about = binding.tooltip or binding.description
                run = partial(self.call_later, screen.run_action, binding.action)
                yield SystemCommand(binding.description, about, run)
        yield SystemCommand("Quit", "Close the panel; running jobs go on", self.action_quit)
        yield SystemCommand("Theme", "Change the colours", self.action_change_theme)
