"""A question that takes yes or no."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Static


def when_yes(do: Callable[[], object]) -> Callable[[bool | None], None]:
    """For push_screen: `do` when the answer is yes."""

    def answered(yes: bool | None) -> None:
        if yes:
            do()

    return answered


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
            keys: list[str | tuple[str, str]] = [
                ("y", "$footer-key-foreground"),
                f" {self.yes}   ",
                ("n", "$footer-key-foreground"),
                " leave it",
            ]
            yield Static(Content.assemble(*keys), classes="keys")

    def action_answer(self, yes: bool) -> None:
        self.dismiss(yes)
