"""A question that takes yes or no."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Static

from tui import keys
from tui.dialogs.keys_line import KeysLine


def when_yes(do: Callable[[], object]) -> Callable[[bool | None], None]:
    """For push_screen: `do` when the answer is yes."""

    def answered(yes: bool | None) -> None:
        if yes:
            do()

    return answered


class Confirm(ModalScreen[bool]):
    """A question; y or Enter is yes."""

    BINDINGS: ClassVar[list[BindingType]] = keys.bindings("question")

    def __init__(self, question: str, detail: str, yes: str) -> None:
        super().__init__()
        self.question, self.detail, self.yes = question, detail, yes

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Static(self.question, classes="question", markup=False)
            yield Static(self.detail, classes="detail", markup=False)
            yield KeysLine({"yes": self.yes})

    def action_answer(self, yes: bool) -> None:
        self.dismiss(yes)
