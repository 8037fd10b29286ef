"""What the four screens share: head with tabs, a line for errors in place, footer, dialogs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import psutil
from textual.actions import parse
from textual.app import ComposeResult
from textual.binding import ActiveBinding, Binding, BindingsMap, BindingType
from textual.containers import Container, Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen, Screen
from textual.widgets import Footer, Static
from textual.worker import Worker, WorkerState

from remote.jobs.launch import EXCLUSIVE
from surgvqa.errors import SurgvqaError
from tui import words
from tui.targets.target import Target, apart, newest_running
from tui.widgets.form import Field
from tui.widgets.pane import Pane

if TYPE_CHECKING:
    from tui.app import Panel
    from tui.settings.settings import Settings

WIDE = 108  # columns from which there is room for two panels side by side
TITLES = {"merge": "Merge", "upload": "Upload", "train": "Train", "monitor": "Monitor"}


class Tab(Static):
    """One of the four tabs; a click goes there."""

    def __init__(self, number: int, mode: str, active: bool) -> None:
        label = Content.assemble((f"{number} ", "$muted"), TITLES[mode])
        super().__init__(label, classes="tab -active" if active else "tab")
        self.mode = mode

    async def on_click(self) -> None:
        await self.app.run_action(f"go('{self.mode}')")


class Head(Horizontal):
    """Program, tabs, and where we are: host, workspace, preset, budget, and a running job."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode

    def compose(self) -> ComposeResult:
        yield Static(" surgvqa ", id="program", markup=False)
        for number, mode in enumerate(TITLES, 1):
            yield Tab(number, mode, mode == self.mode)
        yield Pane(id="busy")


class Where(Pane):
    """Host, workspace, preset and budget in one line."""

    def show_place(self, place: Content, workspace: Path, preset: str | None, budget_gb: float | None) -> None:
        parts = [("workspace", words.short_path(workspace)), ("preset", preset or "none")]
        if budget_gb:
            parts.append(("budget", f"{budget_gb:g} GB"))
        room = self.app.size.width - 2
        if place.cell_length + 5 + sum(len(k) + len(v) + 3 for k, v in parts) <= room:
            spans: list[Content | str | tuple[str, str]] = [("host ", "$muted"), place]
            for name, text in parts:
                spans += ["  ", (f"{name} ", "$muted"), text]
        else:  # no room for every name, perhaps not even for every part
            spans, left = [place], room - place.cell_length
            for name, text in parts:
                shown = words.clip(text, max(8, room // 3), keep_end=name == "workspace")
                label = "budget " if name == "budget" else ""
                if len(shown) + len(label) + 2 <= left:
                    left -= len(shown) + len(label) + 2
                    spans += ["  ", (label, "$muted"), shown]
        self.show(Content.assemble(*spans))


class Notice(Static):
    """The screen's own line for what went wrong or was done."""

    def __init__(self) -> None:
        super().__init__("", id="notice", markup=False)
        self.display = False

    def say(self, text: str, kind: str = "") -> None:
        """`kind`: "", "error", "warning" or "success"; empty text takes the line away."""
        self.set_classes(f"-{kind}" if kind else "")
        self.update(Content(text))
        self.display = bool(text)


class PanelScreen(Screen[None]):
    """A screen of the panel. `body` makes its middle; `tick` is called once a second while it is shown."""

    app: Panel
    MODE: ClassVar[str] = ""
    ABOUT: ClassVar[str] = ""
    """What the screen is for, in the help."""
    AUTO_FOCUS = None
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("v", "set_up", "set up host", tooltip="Install this version of surgvqa on the host")
    ]
    _possible: list[bool | None] | None = None

    def compose(self) -> ComposeResult:
        yield Head(self.MODE)
        yield Where(id="where")
        with Container(id="body"):
            yield from self.body()
        yield Notice()
        yield Footer(show_command_palette=False)

    def body(self) -> ComposeResult:
        """The widgets between head and footer."""
        yield from ()

    async def tick(self) -> None:
        """Once a second while shown, and when it comes to the front."""

    @property
    def workspace_root(self) -> Path:
        """Relative paths on this screen start here."""
        return self.app.here.workspace.root

    def on_worker_state_changed(self, event: Worker.StateChanged) -> None:
        """What nobody foresaw is said in place; the panel goes on."""
        if event.state == WorkerState.ERROR:
            self.say(f"{type(event.worker.error).__name__}: {event.worker.error}", "error")

    def say(self, text: str, kind: str = "") -> None:
        """Shows a line above the footer."""
        self.query_one(Notice).say(text, kind)

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
            host = self.app.host
            return host is not None and host.light.kind == "connected" and bool(host.skew)
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
        self.run_worker(self.tick, group="tick", exclusive=True, exit_on_error=False)

    def on_resize(self) -> None:
        self.show_where()

    def show_where(self) -> None:
        """Draws the head."""
        if not self.is_mounted:
            return
        host = self.app.host
        place = Content(self.app.here.name) if host is None else words.light(host.name, host.light)
        self.query_one(Where).show_place(place, self.workspace_root, self.app.preset, self.app.budget_gb)
        heard = host is None or host.light.kind == "connected"
        running = [r for r in self.app.listed if r.state == "running" and heard]
        text = f"● {running[0].command} running" if running else ""
        if len(running) > 1:
            text = f"● {len(running)} jobs running"
        self.query_one("#busy", Pane).show(Content(text))

    async def action_set_up(self) -> None:
        await self.app.set_up_host()

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
        running = newest_running(self.app.listed, *EXCLUSIVE)
        if running is None:
            go(False)
            return
        detail = f"{running.id} is running. Both would share the memory of {self.app.target.name}."
        self.app.push_screen(Confirm(f"{what} beside it?", detail, "start it"), lambda yes: go(True) if yes else None)

    async def start(self, launch: Callable[[], Awaitable[str]], said: str = "checking the input …") -> str | None:
        """Starts a job and returns its run id; None when it was refused, which is said in place.

        One at a time: the check takes seconds, and who presses the key again meanwhile does not want two jobs.
        """
        if self.app.job_starts:
            return None
        self.app.job_starts = True
        self.say(said)
        try:
            run_id = await launch()
        except (OSError, SurgvqaError) as error:
            self.say(str(error), "error")
            return None
        finally:
            self.app.job_starts = False
        self.say("")
        return run_id

    async def stop_run(self, run_id: str, target: Target | None = None) -> str | None:
        """Ends a run in a thread; its state then, or None when that failed (said in place)."""
        try:
            return await apart((target or self.app.target).stop, run_id)
        except (OSError, SurgvqaError, psutil.Error) as error:
            self.say(f"{run_id} could not be stopped: {error}", "error")
            return None


class Confirm(ModalScreen[bool]):
    """A question; y or Enter is yes."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y,enter", "answer(True)", "yes"),
        Binding("n,escape,q", "answer(False)", "no"),
    ]

    def __init__(self, question: str, detail: str, yes: str) -> None:
        super().__init__()
        self.question, self.detail, self.yes = question, detail, yes

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Static(self.question, classes="question", markup=False)
            yield Static(self.detail, classes="detail", markup=False)
            keys = [("y", "$footer-key-foreground"), f" {self.yes}   ", ("n", "$footer-key-foreground"), " leave it"]
            yield Static(Content.assemble(*keys), classes="keys")

    def action_answer(self, yes: bool) -> None:
        self.dismiss(yes)


class Help(ModalScreen[None]):
    """What this screen is for, and all keys that work on it: taken from the bindings themselves."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,question_mark,q,enter", "dismiss", "close")]

    def __init__(self, title: str, about: str, rows: list[tuple[str, str]]) -> None:
        super().__init__()
        self.heading, self.about, self.rows = title, about, rows

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="dialog wide"):
            yield Static(self.heading, classes="question", markup=False)
            yield Static(self.about, classes="detail", markup=False)
            for key, text in self.rows:
                with Horizontal(classes="help-row"):
                    yield Static(key, classes="help-key", markup=False)
                    yield Static(text, classes="help-text", markup=False)

    def on_mount(self) -> None:
        self.query_one(".dialog").border_subtitle = "Esc closes"
