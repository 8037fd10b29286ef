"""The timeline of a run: it follows what happens until the user moves up, wraps, filters and finds."""

from __future__ import annotations

import textwrap
import time
from typing import ClassVar

from rich.cells import cell_len, chop_cells
from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import BindingType
from textual.geometry import Region, Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

from tui import keys
from tui.follow.timeline import LEVELS, Entry, Timeline, shown

CLOCK = 9
MARKS = {"output": " ", "event": "·", "good": "✓", "warning": "!", "error": "✗"}


class TimelineView(ScrollView, can_focus=True):
    """Draws only the rows that are in view. The cursor is on the newest entry until it is moved."""

    BINDINGS: ClassVar[list[BindingType]] = keys.bindings("timeline")
    COMPONENT_CLASSES: ClassVar[set[str]] = {
        "timeline--clock",
        "timeline--output",
        "timeline--event",
        "timeline--good",
        "timeline--warning",
        "timeline--error",
        "timeline--cursor",
        "timeline--found",
    }

    class Opened(Message):
        """Enter on an entry, or a click."""

        def __init__(self, entry: Entry) -> None:
            super().__init__()
            self.entry = entry

    class Moved(Message):
        """The cursor is on another entry."""

        def __init__(self, entry: Entry) -> None:
            super().__init__()
            self.entry = entry

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.timeline = Timeline()
        self.level = 0
        self.wrapped = True
        self.sought = ""
        self.following = True
        self.unseen = 0
        """Entries that came while one reads further up."""
        self.cursor = -1
        """Of the visible entries; -1: none."""
        self.visible_entries: list[Entry] = []
        self._rows: list[tuple[int, str]] = []
        """(visible entry, text) of each row; the first row of an entry has its time."""
        self._firsts: list[int] = []
        """The first row of each visible entry."""
        self._taken: tuple[object, ...] = ()
        self._count = 0

    # --- content -----------------------------------------------------------------------------------------------------

    def show(self, timeline: Timeline) -> None:
        """What is new of it; another timeline anew."""
        width = self.room
        taken = (id(timeline), timeline.version, self.level, self.wrapped, width)
        same = taken == self._taken
        if same and self._count == len(timeline.entries):
            return
        if self.timeline is not timeline:
            self.following, self.unseen, self.cursor = True, 0, -1
        kept = self.entry
        self.timeline, self._taken = timeline, taken
        if not same:
            self._rows, self._firsts, self.visible_entries, self._count = [], [], [], 0
        new = timeline.entries[self._count :]
        before = len(self.visible_entries)
        for entry in new:
            if shown(entry, self.level):
                self._append(entry, width)
        self._count = len(timeline.entries)
        self.virtual_size = Size(width, len(self._rows))
        if not same and kept is not None and not self.following:
            self.cursor = next((i for i, e in enumerate(self.visible_entries) if e is kept), -1)
        if self.following:
            self.cursor = -1
            self.scroll_to(y=len(self._rows), animate=False, force=True)
        elif same:
            self.unseen += len(self.visible_entries) - before
        self.refresh()

    def _append(self, entry: Entry, width: int) -> None:
        room = max(10, width - CLOCK - 2)
        lines = [entry.text]
        if self.wrapped and cell_len(entry.text) > room:
            lines = textwrap.wrap(entry.text, room, drop_whitespace=False) or [""]
            lines = [part for line in lines for part in (chop_cells(line, room) if cell_len(line) > room else [line])]
        self._firsts.append(len(self._rows))
        self._rows += [(len(self.visible_entries), line) for line in lines]
        self.visible_entries.append(entry)

    @property
    def room(self) -> int:
        """Columns beside the scrollbar."""
        return self.scrollable_content_region.width

    @property
    def entry(self) -> Entry | None:
        """Under the cursor; the newest one while it follows."""
        if not self.visible_entries:
            return None
        return self.visible_entries[self.cursor if 0 <= self.cursor < len(self.visible_entries) else -1]

    def on_resize(self) -> None:
        self.show(self.timeline)
        if self.following:  # its end, at any height
            self.scroll_to(y=len(self._rows), animate=False, force=True)

    # --- what the user may do ----------------------------------------------------------------------------------------

    def action_move(self, by: int) -> None:
        last = len(self.visible_entries) - 1
        if last >= 0:
            at = last if self.cursor < 0 else self.cursor
            self.go_to(max(0, min(last, at + by if self.cursor >= 0 or by < 0 else at)))

    def action_page(self, by: int) -> None:
        self.action_move(by * max(1, self.size.height - 1))

    def action_end(self, last: bool) -> None:
        if last:
            self.follow()
        elif self.visible_entries:
            self.go_to(0)

    def action_open(self) -> None:
        if self.entry:
            self.post_message(self.Opened(self.entry))

    def go_to(self, index: int) -> None:
        """The cursor to a visible entry, which comes into view."""
        self.cursor, self.following = index, False
        first = self._firsts[index]
        after = self._firsts[index + 1] if index + 1 < len(self._firsts) else len(self._rows)
        self.scroll_to_region(
            Region(0, first, 1, min(after - first, max(1, self.size.height))), animate=False, force=True
        )
        self.refresh()
        self.post_message(self.Moved(self.visible_entries[index]))

    def go_to_entry(self, entry: Entry) -> None:
        """The cursor to this entry; the filter is taken off where it hides it."""
        if not shown(entry, self.level):
            self.level = 0
            self.show(self.timeline)
        index = next((i for i, e in enumerate(self.visible_entries) if e is entry), None)
        if index is not None:
            self.go_to(index)

    def follow(self) -> None:
        """The end, and what comes."""
        self.following, self.unseen, self.cursor = True, 0, -1
        self.scroll_to(y=len(self._rows), animate=False, force=True)
        self.refresh()

    def next_level(self) -> str:
        """The next filter, which is returned."""
        self.level = (self.level + 1) % len(LEVELS)
        self.show(self.timeline)
        return LEVELS[self.level]

    def toggle_wrap(self) -> None:
        """Long lines wrapped, or cut."""
        self.wrapped = not self.wrapped
        self.show(self.timeline)

    def find(self, sought: str, by: int = -1) -> int:
        """Goes to the next entry above (`by` -1) or below that holds the words, round the end; how many hold them."""
        self.sought = sought.lower()
        found = [i for i, e in enumerate(self.visible_entries) if self.sought and self.sought in e.text.lower()]
        if found:
            at = len(self.visible_entries) if self.cursor < 0 else self.cursor
            if by < 0:
                self.go_to(next((i for i in reversed(found) if i < at), found[-1]))
            else:
                self.go_to(next((i for i in found if i > at), found[0]))
        self.refresh()
        return len(found)

    def on_click(self, event: events.Click) -> None:
        row = event.y + self.scroll_offset.y
        if 0 <= row < len(self._rows):
            self.go_to(self._rows[row][0])

    def watch_scroll_y(self, old: float, new: float) -> None:
        super().watch_scroll_y(old, new)
        self.vertical_scrollbar.position = new  # also of one that is not shown before the next layout
        if self.following and new < min(old, self.max_scroll_y):  # the wheel or the scrollbar, no change of size
            self.following, self.cursor = False, -1

    # --- drawing -----------------------------------------------------------------------------------------------------

    def render_line(self, y: int) -> Strip:
        row = y + self.scroll_offset.y
        width = self.room
        if row >= len(self._rows):
            return Strip.blank(width, self.rich_style)
        index, text = self._rows[row]
        entry = self.visible_entries[index]
        style = self.get_component_rich_style(f"timeline--{entry.level}")
        clock = self.get_component_rich_style("timeline--clock")
        first = self._firsts[index] == row
        at = time.strftime("%H:%M:%S ", time.localtime(entry.t)) if first and entry.t else " " * CLOCK
        mark = f"{MARKS[entry.level]} " if first else "  "
        segments = [Segment(at, clock), Segment(mark, style), *self._marked(text, style)]
        strip = Strip(segments).crop_extend(0, width, self.rich_style)
        if index == self.cursor:
            strip = strip.apply_style(self.get_component_rich_style("timeline--cursor"))
        return strip

    def _marked(self, text: str, style: Style) -> list[Segment]:
        """The text with what is sought marked in it."""
        if not self.sought:
            return [Segment(text, style)]
        found, low, at = [], text.lower(), 0
        if len(low) != len(text):  # a letter whose small one is longer
            return [Segment(text, style)]
        marked = style + self.get_component_rich_style("timeline--found")
        while (hit := low.find(self.sought, at)) >= 0:
            found += [Segment(text[at:hit], style), Segment(text[hit : hit + len(self.sought)], marked)]
            at = hit + len(self.sought)
        return [segment for segment in [*found, Segment(text[at:], style)] if segment.text]
