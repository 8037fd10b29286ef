"""One entry of a timeline, whole: its text, the lines that the process wrote around it, and the line of a file that it
names."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

from tui import keys


class EntryDialog(ModalScreen[None]):
    """What is known of one entry."""

    BINDINGS: ClassVar[list[BindingType]] = keys.bindings("entry")

    def __init__(self, heading: str, text: str, parts: list[tuple[str, str]]) -> None:
        """`parts`: further texts with a heading each."""
        super().__init__()
        self.heading, self.text, self.parts = heading, text, parts

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="dialog wide"):
            yield Static(self.heading, classes="question", markup=False)
            yield Static(self.text, classes="detail", markup=False)
            for heading, text in self.parts:
                yield Static(heading, classes="question", markup=False)
                yield Static(text, classes="detail output", markup=False)

    def on_mount(self) -> None:
        self.query_one(".dialog").border_subtitle = "Esc closes"
