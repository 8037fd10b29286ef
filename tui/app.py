"""The panel. It owns no work: jobs are processes of their own, all it shows is in their run folders."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from textual import on, work
from textual.app import ScreenStackError, SystemCommand
from textual.binding import BindingType
from textual.events import Event, Key, Paste
from textual.filter import LineFilter
from textual.screen import Screen
from textual.widgets import Input
from textual.worker import Worker

from surgvqa.config.workspace import load_workspace
from surgvqa.files import write_synced
from surgvqa.untrusted import one_line
from tui import keys, log
from tui.dialogs.confirm import Confirm, when_yes
from tui.dialogs.first_run import FirstRun
from tui.dialogs.help import Help
from tui.dialogs.hosts import RENT, HostKey, HostPicker
from tui.follow.notices import RunNotice, RunNotices, headline
from tui.preferences import KEEP_TITLE, Preferences, in_multiplexer, notice, send, title
from tui.screens.ask import AskScreen
from tui.screens.base import WIDE, PanelScreen, RunStarted, SetUpHost
from tui.screens.merge import MergeScreen
from tui.screens.monitor import MonitorScreen
from tui.screens.renting import Renting
from tui.screens.train import TrainScreen
from tui.screens.upload import UploadScreen
from tui.session import Session
from tui.settings.found import found_settings, toml_of
from tui.targets.connection_state import ConnectionState
from tui.targets.local import LocalTarget
from tui.targets.target import newest_running
from tui.targets.threads import in_thread
from tui.textual_internals import write_raw
from tui.theme import THEME, variables_of
from tui.widgets.head import TITLES
from tui.widgets.plain_text import PlainText, WithoutColor

REFRESH_S = 1.0
OPEN_DEMO = 100
"""The panel's exit status when the demo is to be opened in its place."""
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)
"""They close the panel as `q` does, so that the terminal is left as it was."""
SCREENS: dict[str, type[PanelScreen]] = {
    "merge": MergeScreen,
    "upload": UploadScreen,
    "train": TrainScreen,
    "monitor": MonitorScreen,
    "ask": AskScreen,
}


class Panel(Renting):
    """Five screens over one target: this machine, or one of the hosts. Merging and uploading are always done here."""

    TITLE = "surgvqa"
    CSS_PATH = "panel.tcss"
    HORIZONTAL_BREAKPOINTS: list[tuple[int, str]] | None = [(0, "-narrow"), (WIDE, "-wide")]  # noqa: RUF012
    BINDINGS: ClassVar[list[BindingType]] = keys.bindings("panel")

    def __init__(
        self,
        here: LocalTarget,
        host: str | None = None,
        theme_file: Path | None = None,
        preferences: Preferences | None = None,
        keymap: dict[str, str] | None = None,
    ) -> None:
        """`theme_file` keeps the name of the chosen theme between starts; `keymap` are remapped keys by id."""
        super().__init__()
        self.session = Session(here, host)
        self.preferences = preferences or Preferences()
        self.notices = RunNotices(self.preferences.money)
        self._money: tuple[object, ...] = ()
        """What the head was drawn with: what is rented, and whether the chosen one is idle."""
        self.to_tell: list[RunNotice] = []
        """What is said on the next screen that is in front."""
        self._title = ""
        self.set_keymap(keymap or {})
        self._theme_file = theme_file
        self._plain_text, self._without_color = PlainText(), WithoutColor()
        self._seen: dict[str, ConnectionState] = {}
        """What was said of each connection."""
        for mode, screen in SCREENS.items():
            self.add_mode(mode, partial(screen, self.session))
        self.register_theme(THEME)
        self.theme = "surgvqa"
        if theme_file:
            with contextlib.suppress(OSError, ValueError):
                name = theme_file.read_text(encoding="utf-8").strip()
                self.theme = name if name in self.available_themes else self.theme

    def get_theme_variable_defaults(self) -> dict[str, str]:
        """What the panel's styles name and Textual's own themes do not define."""
        return variables_of(self.current_theme)

    def get_line_filters(self) -> Sequence[LineFilter]:
        """Textual's own, after the one that keeps control characters from the terminal; with NO_COLOR no colour."""
        if self.no_color:  # Textual would draw in grey, which is a colour too
            return [self._plain_text, self._without_color]
        return [self._plain_text, *super().get_line_filters()]

    @property
    def front(self) -> PanelScreen | None:
        """The screen that is shown; None behind a dialog and while the panel closes."""
        try:
            return self.screen if isinstance(self.screen, PanelScreen) else None
        except ScreenStackError:
            return None

    async def on_mount(self) -> None:
        self.at_terminal = not self.is_headless and sys.stdin.isatty()
        if not self.is_headless:
            for number in ENDING_SIGNALS:
                asyncio.get_running_loop().add_signal_handler(number, self.exit, None, 128 + number)
            if self.preferences.title:
                write_raw(self, KEEP_TITLE)
        await self.refresh_runs()
        await self.switch_mode(self._first_mode())
        self.set_interval(REFRESH_S, self._tick)
        workspace = self.session.here.workspace
        if not workspace.file.is_file() and not self.session.listed and self.session.host is None:
            found = await in_thread(found_settings, workspace.root)
            self.push_screen(FirstRun(workspace.root.name, toml_of(found) if found else ""), self._begin)

    async def _begin(self, way: str | None) -> None:
        """As the first question was answered."""
        workspace = self.session.here.workspace
        if way == "demo":
            self.exit(None, OPEN_DEMO)
        elif way == "host":
            self.action_hosts()
        elif way == "file":
            write_synced(workspace.file, toml_of(await in_thread(found_settings, workspace.root)).encode())
            fresh = load_workspace(workspace.root)
            workspace.values, workspace.by_command = fresh.values, fresh.by_command
            if isinstance(self.screen, MergeScreen):
                self.screen.reload()

    def _first_mode(self) -> str:
        """Where one would go on: a running job, else the first step not done. Of a host neither is known yet."""
        if self.session.host or newest_running(self.session.listed):
            return "monitor"
        workspace = self.session.here.workspace
        merged = workspace.value("output_path", "merge") or workspace.value("model_name_or_path", "train")
        return "train" if merged and (Path(merged) / "config.json").is_file() else "merge"

    def _tick(self) -> None:
        work: Callable[[], Any] = self._refresh
        self.run_worker(work, group="tick", exclusive=True, exit_on_error=False)

    async def _refresh(self) -> None:
        if self.at_terminal and not sys.stdin.isatty():  # gone without SIGHUP; Textual would read its end for ever
            self.exit(None, 128 + signal.SIGHUP)
            return
        await self.refresh_runs()
        await self.go_on_renting()
        await self.look_at_rented()
        self.show_connection()
        if self.front and self.front.is_mounted:  # composed
            await self.front.tick()
        await self.notify_of_runs()

    async def notify_of_runs(self) -> None:
        """Follows what runs, tells what is new of it, and puts it into the terminal's title."""
        followed = self.session.working()
        for follower in followed:
            await follower.poll()
            for told in self.notices.look(follower):
                self.tell(told)
        if self.front and self.to_tell:
            kind = "error" if any(told.kind == "error" for told in self.to_tell) else self.to_tell[-1].kind
            self.front.say("  ·  ".join(told.text for told in self.to_tell), kind)
            self.to_tell = []
        going = next((f for f in followed if f.active), None)
        self.set_title(headline(going) if going else f"surgvqa · {self.session.here.workspace.root.name}")

    def tell(self, told: RunNotice) -> None:
        """On the screen, by the terminal, and by the webhook, as the preferences have it."""
        self.to_tell.append(told)
        notify = self.preferences.notify
        if not self.is_headless and notify == "osc9" and not in_multiplexer():
            write_raw(self, notice(told.text))
        elif notify != "off":
            self.bell()
        if self.preferences.webhook:
            self._post(told.text)

    @work(group="webhook", exit_on_error=False)
    async def _post(self, text: str) -> None:
        try:
            await in_thread(send, self.preferences.webhook, text)
        except (OSError, ValueError) as error:
            self.to_tell.append(RunNotice(f"the webhook was not reached: {error}", "warning"))

    def set_title(self, text: str) -> None:
        """The terminal's title, when it changed."""
        if text != self._title and self.preferences.title and not self.is_headless:
            write_raw(self, title(text))
        self._title = text

    def on_worker_state_changed(self, event: Worker.StateChanged) -> None:
        """An error while refreshing is said on the screen in front."""
        if self.front:
            self.front.on_worker_state_changed(event)

    async def refresh_runs(self) -> None:
        """Reads the run lists anew."""
        changed = await self.session.refresh_runs()
        before, self._money = self._money, (tuple(self.session.rented), self.session.idle())
        if (changed or before != self._money) and self.front:
            self.front.show_where()
            self.front.keys_changed()

    def show_connection(self) -> None:
        """Says once what became of the chosen host's connection; an unknown key asks."""
        host, front = self.session.host, self.front
        if host is None or front is None or self._seen.get(host.name) == host.connection:
            return
        before, connection = self._seen.get(host.name), host.connection
        self._seen[host.name] = connection
        front.show_where()
        front.keys_changed()
        if connection.kind == "unknown key" and connection.key:
            self.push_screen(HostKey(connection.key), lambda yes: host.link.accept() if yes else host.link.refuse())
        elif connection.kind == "refused":
            front.say(connection.text, "error")
        elif connection.kind == "unreachable" and (before is None or before.kind != "unreachable"):
            front.say(connection.text, "warning")
        elif connection.kind == "connected" and host.skew:
            front.say(f"{host.name}: {host.skew}; v sets it up", "warning")
        elif connection.kind == "connected" and before and before.kind != "connecting":
            front.say(f"{host.name}: connected again", "success")
        elif connection.kind in ("connecting", "connected"):
            front.say("")

    def watch_theme(self, name: str) -> None:
        """Keeps the choice; a folder that cannot be written only loses it."""
        if self._theme_file and self.is_running:
            with contextlib.suppress(OSError):
                self._theme_file.parent.mkdir(parents=True, exist_ok=True)
                self._theme_file.write_text(f"{name}\n", encoding="utf-8")

    # --- what the keys do --------------------------------------------------------------------------------------------

    async def on_event(self, event: Event) -> None:
        """A key or a paste does its work before the next one is looked at.

        Textual hands a key to the widget with the focus, whose bindings run only when the key has bubbled back here:
        of keys that arrive together (a slow line, a paste, a script) later letters then overtake earlier commands.
        """
        if isinstance(event, (Key, Paste)) and not event.is_forwarded and self.front and await self._in_order(event):
            return
        await super().on_event(event)

    async def _in_order(self, event: Key | Paste) -> bool:
        """Does what the event asks for; whether it asked for anything."""
        field = self.focused if isinstance(self.focused, Input) else None
        if isinstance(event, Paste):
            if field:
                field.replace(one_line(event.text.partition("\n")[0].rstrip("\r")), *field.selection)
            return field is not None
        if field and event.is_printable and event.character:
            field.replace(event.character, *field.selection)
            return True
        assert self.front
        active = self.front.active_bindings.get(event.key)
        return active is not None and active.enabled and await self.run_action(active.binding.action, active.node)

    async def action_go(self, mode: str) -> None:
        """One of the screens."""
        if self.front:
            await self.switch_mode(mode)

    async def action_quit(self) -> None:
        """Closes the panel; asks first when what was typed would be lost. In that question the key closes it."""
        edited = [name for settings in self.session.edited.values() for name in settings]
        if not edited or self.front is None:
            self.exit()
            return
        detail = f"Edited here and not in surgvqa.toml: {', '.join(edited)}. Running jobs go on."
        self.push_screen(Confirm("Quit and lose the edits?", detail, "quit"), when_yes(self.exit))

    def action_hosts(self) -> None:
        """The list of hosts; the chosen one becomes the target."""
        if self.front:
            self.push_screen(HostPicker(self.session), self.choose)

    async def choose(self, name: str | None) -> None:
        if name is None:
            return
        if name == RENT:
            self.ask_for_offers()
            return
        self.session.choose(name)
        self._seen.pop(name, None)
        if self.front:
            self.front.say("")
        await self.refresh_runs()
        if self.front:
            self.front.show_where()
            self.front.keys_changed()
        self._tick()

    @on(SetUpHost)
    async def _set_up_host(self) -> None:
        """On Upload, where its output is shown."""
        await self.switch_mode("upload")
        if isinstance(self.screen, UploadScreen):
            self.screen.set_up_host()

    def on_unmount(self) -> None:
        self.session.end()

    def action_help(self) -> None:
        """All keys of this screen."""
        screen = self.front
        if screen is None:
            return
        rows: dict[str, list[str]] = {}  # keys that do one thing share a row
        for active in screen.working_keys():
            if active.binding.id and active.binding.id != "panel.quit_now":
                key, about = self.get_key_display(active.binding), screen.about_key(active.binding)
                if key not in rows.setdefault(about, []):
                    rows[about].append(key)
        about = f"{screen.ABOUT} Errors are logged in {log.path}." if log.path else screen.ABOUT
        self.push_screen(Help(TITLES[screen.MODE], about, [(" ".join(shown), text) for text, shown in rows.items()]))

    @on(RunStarted)
    async def _monitor(self, started: RunStarted) -> None:
        """Goes to Monitor and follows the run."""
        await self.refresh_runs()
        await self.switch_mode("monitor")
        if isinstance(self.screen, MonitorScreen):
            self.screen.attach(started.run_id)
            host = self.session.host
            if host and host.warning:
                self.screen.say(host.warning, "warning")
                host.warning = ""

    def get_system_commands(self, screen: Screen) -> Iterable[SystemCommand]:
        """The palette: the screens, what this screen can do now, and Textual's own."""
        for mode, name in TITLES.items():
            yield SystemCommand(name, f"Go to {name}", partial(self.call_later, self.action_go, mode))
        yield SystemCommand("Quit", "Close the panel; running jobs go on", self.action_quit)
        yield SystemCommand("Theme", "Change the colours", self.action_change_theme)
        if not isinstance(screen, PanelScreen):
            return
        for active in screen.working_keys():
            binding = active.binding
            if isinstance(active.node, PanelScreen) and active.enabled:
                run = partial(self.call_later, screen.run_action, binding.action)
                yield SystemCommand(screen.name_key(binding), screen.about_key(binding), run)
