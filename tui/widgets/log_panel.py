"""The end of a run's log: it follows what is written until the user scrolls up, and finds words in it."""

from __future__ import annotations

from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.message import Message
from textual.widgets import Input, Log

from tui.widgets.titles import set_subtitle, set_title


class Search(Input):
    """Words to find in the log; shown only while they are typed."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "submit", "find"), Binding("escape", "leave", "cancel")]

    def action_leave(self) -> None:
        self.display = False
        self.screen.query_one(Log).focus()


class LogPanel(Vertical):
    """The log, the number of lines that came while one reads further up, and the search."""

    class Found(Message):
        """How many lines hold the words that were sought."""

        def __init__(self, sought: str, lines: int) -> None:
            super().__init__()
            self.sought, self.lines = sought, lines

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(id=id, classes=classes)
        self.unseen = 0
        self.sought = ""

    def compose(self) -> ComposeResult:
        yield Log(id="log", max_lines=5000)
        yield Search(placeholder="find in the log", compact=True)

    def on_mount(self) -> None:
        set_title(self, "log")
        self.query_one(Search).display = False
        self.query_one(Log).anchor()

    def clear(self) -> None:
        """Another run's log comes."""
        self.unseen = 0
        self.query_one(Log).clear()

    def show(self, lines: list[str]) -> None:
        """Appends in one batch; a reader who has scrolled up stays there and is told how many lines are new."""
        log = self.query_one(Log)
        if lines:
            following = not self.unseen and (log.is_vertical_scroll_end or not log.size.height)
            log.write_lines(lines)
            self.unseen = 0 if following else self.unseen + len(lines)
        empty = "" if log.line_count else "nothing written"
        set_subtitle(self, f"+{self.unseen:,} lines · t follows" if self.unseen else empty)

    def follow(self) -> None:
        """Jumps to the end and stays there."""
        self.query_one(Log).scroll_end(animate=False)
        self.unseen = 0
        self.show([])

    def ask(self) -> None:
        """Opens the search."""
        field = self.query_one(Search)
        field.display = True
        self.screen.set_focus(field)

    @on(Search.Submitted)
    def _search(self, event: Search.Submitted) -> None:
        event.stop()
        self.sought = event.value.lower()
        self.query_one(Search).action_leave()
        self.search()

    def search(self) -> None:
        """Scrolls to the next line above that holds the words; from the end again after the first."""
        if not self.sought:
            return
        log = self.query_one(Log)
        found = [i for i, line in enumerate(log.lines) if self.sought in line.lower()]
        if found:
            top = log.scroll_offset.y
            log.scroll_to(y=next((i for i in reversed(found) if i < top), found[-1]), animate=False, force=True)
        self.post_message(self.Found(self.sought, len(found)))
