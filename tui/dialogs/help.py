"""The keys of a screen."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

from tui import keys


class Help(ModalScreen[None]):
    """What this screen is for, and all keys that work on it: taken from the bindings themselves."""

    BINDINGS: ClassVar[list[BindingType]] = keys.bindings("help")

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
