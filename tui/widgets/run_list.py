"""The list of runs: filtered, sorted, and up to three of them marked for comparing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from textual.binding import BindingType
from textual.content import Content

from surgvqa.runs.history import RunSummary
from tui import keys
from tui.content.facts import run_row
from tui.widgets.filtered import FilteredList

COMPARED = 3


class RunList(FilteredList[RunSummary]):
    """The runs as they are chosen; the highlight stays on its run."""

    BINDINGS: ClassVar[list[BindingType]] = keys.bindings("run_list")
    orders: ClassVar[dict[str, Callable[[RunSummary], Any]]] = {
        "newest": lambda run: 0,
        "name": lambda run: (run.name or run.id).lower(),
        "state": lambda run: run.state,
        "steps": lambda run: -run.steps,
    }

    def __init__(self, *, id: str, classes: str) -> None:
        super().__init__(id=id, classes=classes)
        self.attached: str | None = None
        self.marked: list[str] = []
        """Ids, in the order of marking."""
        self._drawn: tuple[object, ...] = ()

    def key(self, item: RunSummary) -> str:
        return item.id

    def text(self, item: RunSummary) -> str:
        return f"{item.id} {item.name} {item.state}"

    def row(self, item: RunSummary) -> Content:
        return run_row(item, item.id == self.attached, item.id in self.marked, max(24, self.size.width - 2))

    def also(self) -> str:
        return f"{len(self.marked)} marked · d compares" if len(self.marked) > 1 else ""

    def show_runs(self, listed: list[RunSummary], attached: str | None) -> None:
        """The list, when it changed."""
        self.attached = attached
        known = {run.id for run in listed}
        self.marked = [id for id in self.marked if id in known]
        by_steps = self.sort == "steps"
        drawn = (attached, self.size.width, [(r.id, r.state, r.name, by_steps and r.steps) for r in listed])
        if drawn != self._drawn:  # rows cost more than this
            self._drawn = drawn
            self.show(listed, attached)

    def on_resize(self) -> None:
        self.show_runs(self.items, self.attached)

    def action_mark(self) -> None:
        """Marks the highlighted run; of more than three the one marked first loses its mark."""
        option = self.highlighted_option
        if option is None or option.id is None:
            return
        if option.id in self.marked:
            self.marked.remove(option.id)
        else:
            self.marked = [*self.marked, option.id][-COMPARED:]
        self.redraw()
        self.post_message(self.OptionHighlighted(self, option, self.highlighted or 0))  # other keys work now
