"""A line in which one types what to find; shown only while it is typed."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from textual.binding import BindingType
from textual.widgets import Input

from tui import keys


class Search(Input):
    """Calls `done` with what was typed, `typed` at each letter and with '' when it is dropped; either way `left`."""

    BINDINGS: ClassVar[list[BindingType]] = keys.bindings("search")

    def __init__(
        self,
        what: str,
        *,
        done: Callable[[str], object],
        left: Callable[[], object],
        typed: Callable[[str], object] = lambda text: None,
        id: str | None = None,
    ) -> None:
        super().__init__(placeholder=what, compact=True, id=id, classes="search")
        self.done, self.left, self.typed = done, left, typed
        self.display = False

    def ask(self) -> None:
        """Opens it, with what was typed last selected."""
        self.display = True
        self.screen.set_focus(self)
        self.select_all()

    def on_input_changed(self, event: Input.Changed) -> None:
        event.stop()
        if self.display:
            self.typed(event.value)

    async def action_submit(self) -> None:
        """At once, and not by a message: the keys after Enter are for what has the focus then."""
        self._close()
        self.done(self.value)

    def action_leave(self) -> None:
        self._close()
        self.typed("")

    def _close(self) -> None:
        self.display = False
        self.left()
