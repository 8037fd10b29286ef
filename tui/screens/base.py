"""What the screens share: head with tabs, a line for errors in place, footer, dialogs."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import psutil
from textual import work
from textual.actions import parse
from textual.app import ComposeResult
from textual.binding import ActiveBinding, Binding, BindingsMap, BindingType
from textual.containers import Container
from textual.content import Content
from textual.events import DescendantFocus
from textual.message import Message
from textual.reactive import Reactive
from textual.screen import Screen
from textual.widget import Widget
from textual.widgets import Static
from textual.worker import Worker, WorkerState

from remote.jobs.launch import EXCLUSIVE
from surgvqa.errors import SurgvqaError
from tui import keys, log, words
from tui.dialogs.confirm import Confirm, when_yes
from tui.session import Session
from tui.settings.save import save
from tui.settings.settings import Settings
from tui.targets.target import ACTIVE, Target, newest_running
from tui.targets.threads import in_thread
from tui.widgets.form import Field
from tui.widgets.head import Head, Notice, Where
from tui.widgets.keys import Keys
from tui.widgets.pane import Pane

logger = logging.getLogger(__name__)

WIDE = 108  # columns from which there is room for two panels side by side
LOW, SMALL, TINY = (72, 23), (56, 17), (36, 10)
"""Columns and rows below which there is room for the chart but not for the timeline; for figures alone; for nothing."""


class RunStarted(Message):
    """A screen has started a run that is to be followed on Monitor."""

    def __init__(self, run_id: str) -> None:
        super().__init__()
        self.run_id = run_id


class JobHere(Message):
    """A job of this machine for a host was started; Upload shows it."""

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
    BINDINGS: ClassVar[list[BindingType]] = keys.bindings("screen")
    _possible: list[bool | None] | None = None
    focused: Reactive[Widget | None] = Reactive(None, repaint=False)
    """As Screen has it, which would draw the whole screen anew whenever the focus moves."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session

    def compose(self) -> ComposeResult:
        yield Static("", id="tiny", markup=False)
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

    def name_key(self, binding: Binding) -> str:
        """What a key does, as the palette lists it."""
        return binding.description

    def about_key(self, binding: Binding) -> str:
        """What a key does, for the help."""
        return binding.tooltip or binding.description

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action == "set_up":
            host = self.session.host
            return host is not None and host.connection.kind == "connected" and bool(host.skew)
        if action == "end_machine":
            return self.session.rented_host() is not None
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

    def on_descendant_focus(self, event: DescendantFocus) -> None:
        """The panel that has the keys is bright. By a class: `:focus-within` would restyle all that is in it at each
        key."""
        around = set(event.widget.ancestors_with_self)
        for panel in self.query(".panel"):
            panel.set_class(panel in around, "-keys")

    def on_descendant_blur(self) -> None:
        if self.focused is None:
            self.query(".panel").set_class(False, "-keys")

    def on_resize(self) -> None:
        width, height = self.app.size
        self.set_class(width < LOW[0] or height < LOW[1], "-low")
        self.set_class(width < SMALL[0] or height < SMALL[1], "-small")
        tiny = width < TINY[0] or height < TINY[1]
        self.set_class(tiny, "-tiny")
        if tiny:
            self.query_one("#tiny", Static).update(f"{width}×{height}: the panel needs {TINY[0]}×{TINY[1]}")
        self.show_where()

    def show_where(self) -> None:
        """Draws the head."""
        if not self.is_mounted:
            return
        host = self.session.host
        place = Content(self.session.here.name) if host is None else words.connection(host.name, host.connection)
        self.query_one(Where).show_place(place, self.workspace_root, self.next_launch())
        heard = host is None or host.connection.kind == "connected"
        jobs = [r for r in self.session.shown_runs() if r.state in ("running", "silent") and heard]
        silent = sum(r.state == "silent" for r in jobs)
        what = jobs[0].command if len(jobs) == 1 else f"{len(jobs)} jobs"
        busy = Content.assemble((f"◌ {what} silent" if silent == len(jobs) else f"◌ {silent} silent", "bold $warning"))
        if silent < len(jobs):
            busy = Content("  ").join([Content(f"● {what} running"), *([busy] if silent else [])])
        self.query_one("#busy", Pane).show(
            Content("  ").join(part for part in (self._money(), busy if jobs else "") if part)
        )

    def _money(self) -> Content:
        """What costs money now."""
        parts = []
        idle = self.session.idle()
        for one in self.session.rented:
            paid = f"{one.name} {words.price(one.price_per_hour, '/h')}, {words.price(one.cost)} so far"
            if one.not_ended:
                parts.append(Content.assemble((f"{paid}: NOT ENDED", "bold $error")))
            elif one.idle_s:
                since = f"{paid}: IDLE for {words.seconds(one.idle_s)} after its job"
                parts.append(Content.assemble((since, "bold $warning")))
            elif idle and self.session.host and one.name == self.session.host.name:
                parts.append(Content.assemble((f"{paid}: idle, x ends it", "bold $warning")))
            else:
                parts.append(Content.assemble((paid, "$warning")))
        return Content("  ").join(parts)

    def next_launch(self) -> list[tuple[str, str]]:
        """What the head says of the settings with which the next training would start."""
        return [("preset", self.session.preset or "none"), ("budget", f"{self.session.budget_gb:g} GB")]

    def action_set_up(self) -> None:
        self.post_message(SetUpHost())

    def action_end_machine(self) -> None:
        """Asks first; says what is not here yet."""
        one, here = self.session.rented_host(), self.session.here
        if one is None:
            return
        known = {run.id: run.state for run in self.session.listed_here}
        going = [run.id for run in self.session.listed if run.state in ACTIVE]
        away = [run.id for run in self.session.listed if run.id not in known and run.id not in going]
        detail = f"It has cost {words.price(one.cost)}. Its disk goes with it."
        detail += f"\nNot here yet, and fetched first: {', '.join(away)}" if away else "\nEvery run is verified first."
        detail += f"\nStill running, so it is refused until they end: {', '.join(going)}" if going else ""
        go = partial(here.launch, "end", one.name, module="remote")
        self.app.push_screen(Confirm(f"End {one.name}?", detail, "end it"), when_yes(lambda: self._end_machine(go)))

    @work(group="launch", exit_on_error=False)
    async def _end_machine(self, go: Callable[[], Awaitable[str]]) -> None:
        run_id = await self.start(go, "ending: what is there comes home first …")
        if run_id:
            self.post_message(JobHere(run_id))

    async def apply_edit(self, event: Field.Edited, settings: Settings) -> bool:
        """Writes what was typed into the settings. False if it is invalid; its field then keeps it."""
        try:
            settings.edit(event.field.key, event.text)
        except SurgvqaError as error:
            self.say(str(error), "error")
            await event.field.action_edit(event.text)
            return False
        self.say("")
        return True

    def save_settings(self, settings: Settings, preset: str | None = None) -> bool:
        """Writes what was typed to surgvqa.toml; whether anything was written."""
        if not settings.edited and preset == settings.workspace.preset:
            self.say("nothing was edited")
            return False
        try:
            written = save(settings.workspace, settings.command, settings.edited, preset)
        except SurgvqaError as error:
            self.say(str(error), "error")
            return False
        settings.edited.clear()
        self.say(f"written to {settings.workspace.file.name}: {', '.join(written)}", "success")
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
