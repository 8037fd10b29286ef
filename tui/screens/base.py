"""What the four screens share: head with tabs, a line for errors in place, footer, dialogs."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, ClassVar

import psutil
from textual.actions import parse
from textual.app import ComposeResult
from textual.binding import ActiveBinding, Binding, BindingsMap, BindingType
from textual.containers import Container
from textual.content import Content
from textual.message import Message
from textual.screen import Screen
from textual.worker import Worker, WorkerState

from remote.jobs.launch import EXCLUSIVE
from surgvqa.errors import SurgvqaError
from tui import log, words
from tui.dialogs.confirm import Confirm, when_yes
from tui.session import Session
from tui.settings.settings import Settings
from tui.targets.target import Target, newest_running
from tui.targets.threads import in_thread
from tui.widgets.form import Field
from tui.widgets.head import Head, Notice, Where
from tui.widgets.keys import Keys
from tui.widgets.pane import Pane

logger = logging.getLogger(__name__)

WIDE = 108  # columns from which there is room for two panels side by side


class RunStarted(Message):
    """A screen has started a run that is to be followed on Monitor."""

    def __init__(self, run_id: str) -> None:
        super().__init__()
        self.run_id = run_id


class SetUpHost(Message):
    """This version of surgvqa is to be installed on the chosen host."""


class PanelScreen(Screen[None]):
    """A screen of the panel. `body` makes its middle; `tick` is called once a second while it is shown."""

    MODE: ClassVar[str] = ""
    ABOUT: ClassVar[str] = ""
    """What the screen is for, in the help."""
    AUTO_FOCUS = None
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("v", "set_up", "set up host", tooltip="Install this version of surgvqa on the host")
    ]
    _possible: list[bool | None] | None = None

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session

    def compose(self) -> ComposeResult:
        yield Head(self.MODE)
        yield Where(id="where")
        with Container(id="body"):
            yield from self.body()
        yield Notice()
        yield Keys(show_command_palette=False)

    def body(self) -> ComposeResult:
        """The widgets between head and footer."""
        yield from ()

    async def tick(self) -> None:
        """Once a second while shown, and when it comes to the front."""

    @property
    def workspace_root(self) -> Path:
        """Relative paths on this screen start here."""
        return self.session.here.workspace.root

    def on_worker_state_changed(self, event: Worker.StateChanged) -> None:
        """An unexpected error is shown in place and logged with its traceback; the panel goes on."""
        if event.state == WorkerState.ERROR:
            logger.error("a worker of the panel failed", exc_info=event.worker.error)
            self.say(f"{type(event.worker.error).__name__}: {event.worker.error}{log.where()}", "error")

    def say(self, text: str, kind: str = "") -> None:
        """Shows a line above the footer; nothing happens while the screen is closing."""
        for notice in self.query(Notice):
            notice.say(text, kind)

    def working_keys(self) -> list[ActiveBinding]:
        """The keys that work now, without those that Textual gives to every screen."""
        every_screen = {binding.action for _, binding in BindingsMap(Screen.BINDINGS)}
        return [
            active
            for active in self.active_bindings.values()
            if active.binding.action not in every_screen and not active.binding.system
        ]

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action == "set_up":
            host = self.session.host
            return host is not None and host.connection.kind == "connected" and bool(host.skew)
        return True

    def keys_changed(self) -> None:
        """Draws the footer anew, if other keys work now than before."""
        actions = [parse(binding.action) for _, binding in self._bindings]
        possible = [self.check_action(name, arguments) for _, name, arguments in actions]
        if possible != self._possible:
            self._possible = possible
            self.refresh_bindings()

    def on_screen_resume(self) -> None:
        self.show_where()
        work: Callable[[], Any] = self.tick
        self.run_worker(work, group="tick", exclusive=True, exit_on_error=False)

    def on_resize(self) -> None:
        self.show_where()

    def show_where(self) -> None:
        """Draws the head."""
        if not self.is_mounted:
            return
        host = self.session.host
        place = Content(self.session.here.name) if host is None else words.connection(host.name, host.connection)
        self.query_one(Where).show_place(place, self.workspace_root, self.next_launch())
        heard = host is None or host.connection.kind == "connected"
        running = [r for r in self.session.listed if r.state == "running" and heard]
        text = f"● {running[0].command} running" if running else ""
        if len(running) > 1:
            text = f"● {len(running)} jobs running"
        self.query_one("#busy", Pane).show(Content(text))

    def next_launch(self) -> list[tuple[str, str]]:
        """What the head says of the settings with which the next training would start."""
        return [("preset", self.session.preset or "none"), ("budget", f"{self.session.budget_gb:g} GB")]

    def action_set_up(self) -> None:
        self.post_message(SetUpHost())

    async def take(self, event: Field.Edited, settings: Settings) -> bool:
        """Takes what was typed into the settings. What is no value is said, and stays in its field to be mended."""
        try:
            settings.edit(event.field.key, event.text)
        except SurgvqaError as error:
            self.say(str(error), "error")
            await event.field.action_edit(event.text)
            return False
        self.say("")
        return True

    def ask_beside(self, what: str, go: Callable[[bool], object]) -> None:
        """`go(share)` at once; while another job has the GPU there only after a yes."""
        running = newest_running(self.session.listed, *EXCLUSIVE)
        if running is None:
            go(False)
            return
        detail = f"{running.id} is running. Both would share the memory of {self.session.target.name}."
        self.app.push_screen(Confirm(f"{what} beside it?", detail, "start it"), when_yes(lambda: go(True)))

    async def start(self, launch: Callable[[], Awaitable[str]], said: str = "checking the input …") -> str | None:
        """Starts a job and returns its run id; None when it was refused, which is said in place.

        One at a time: the check takes seconds, and who presses the key again meanwhile does not want two jobs.
        """
        if self.session.job_starts:
            return None
        self.session.job_starts = True
        self.say(said)
        try:
            run_id = await launch()
        except (OSError, SurgvqaError) as error:
            self.say(str(error), "error")
            return None
        finally:
            self.session.job_starts = False
        self.say("")
        return run_id

    async def stop_run(self, run_id: str, target: Target | None = None) -> str | None:
        """Ends a run in a thread; its state then, or None when that failed (said in place)."""
        try:
            return await in_thread((target or self.session.target).stop, run_id)
        except (OSError, SurgvqaError, psutil.Error) as error:
            self.say(f"{run_id} could not be stopped: {error}", "error")
            return None
