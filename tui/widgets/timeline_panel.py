"""The timeline in its panel: its title, what its filter hides, the number of entries that came, and the search."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.message import Message

from tui.follow.timeline import LEVELS, Timeline
from tui.widgets.search import Search
from tui.widgets.timeline_view import TimelineView
from tui.widgets.titles import set_subtitle, set_title


class TimelinePanel(Vertical):
    """A run's timeline."""

    class Found(Message):
        """How many entries hold the words that were sought."""

        def __init__(self, sought: str, entries: int) -> None:
            super().__init__()
            self.sought, self.entries = sought, entries

    def compose(self) -> ComposeResult:
        yield TimelineView(id="timeline")
        yield Search("find in the timeline", done=self.find, left=self.view_focus, id="timeline-search")

    def on_mount(self) -> None:
        set_title(self, "timeline")

    @property
    def view(self) -> TimelineView:
        return self.query_one(TimelineView)

    def view_focus(self) -> None:
        """The keys go to the timeline."""
        self.screen.set_focus(self.view)

    def show(self, timeline: Timeline) -> None:
        """Draws what is new."""
        self.view.show(timeline)
        self.show_subtitle()

    def show_subtitle(self) -> None:
        """What one does not see."""
        view = self.view
        parts = [f"+{view.unseen:,} · t follows" if view.unseen else ""]
        parts += [LEVELS[view.level] if view.level else "", "" if view.wrapped else "long lines cut"]
        empty = "" if view.timeline.entries else "nothing yet"
        set_subtitle(self, " · ".join(part for part in parts if part) or empty)

    def ask(self) -> None:
        """Opens the search."""
        self.query_one(Search).ask()

    def find(self, sought: str, by: int = -1) -> None:
        """Goes to the next entry with the words; those sought last when `sought` is ''."""
        sought = sought or self.view.sought
        if sought:
            self.post_message(self.Found(sought, self.view.find(sought, by)))
            self.show_subtitle()
