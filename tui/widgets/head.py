"""The head of every screen: tabs, where jobs run, notices."""

from __future__ import annotations

from pathlib import Path

from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.content import Content
from textual.widgets import Static

from surgvqa.untrusted import printable
from tui import words
from tui.widgets.pane import Pane

TITLES = {"merge": "Merge", "upload": "Upload", "train": "Train", "monitor": "Monitor", "ask": "Ask"}


class Tab(Static):
    """One of the tabs; a click goes there."""

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
    """Host, workspace, and what the screen adds, in one line."""

    def show_place(self, place: Content, workspace: Path, settings: list[tuple[str, str]]) -> None:
        parts = [("workspace", words.short_path(workspace)), *settings]
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
        self.update(Content(printable(text)))
        self.display = bool(text)
