"""A folder without surgvqa.toml: the ways to begin."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from tui import keys
from tui.dialogs.keys_line import KeysLine


class FirstRun(ModalScreen[str | None]):
    """Answers what to do: demo, file, checkpoint or host; None leaves everything as it is."""

    BINDINGS: ClassVar[list[BindingType]] = keys.bindings("first_run")

    def __init__(self, folder: str, found: str) -> None:
        """`found`: the surgvqa.toml that what lies here would give; '' when nothing does."""
        super().__init__()
        self.folder, self.found = folder, found

    def compose(self) -> ComposeResult:
        ways = {"demo": ("Try the demo", "a small workspace in ./demo, with data and a recorded GPU run")}
        if self.found:
            ways = {"file": ("Make surgvqa.toml", "from what lies in this folder, shown below"), **ways}
        ways["checkpoint"] = ("Choose the checkpoint", "type the paths on the Merge screen")
        ways["host"] = ("Choose a GPU host", "one of ~/.ssh/config or hosts.toml")
        with Vertical(classes="dialog wide"):
            yield Static(
                f"{self.folder} has no surgvqa.toml. How do you want to begin?", classes="question", markup=False
            )
            rows = [
                Option(Content.assemble((f"{name:<23}", "bold"), (about, "$muted")), id=id)
                for id, (name, about) in ways.items()
            ]
            yield OptionList(*rows, id="ways", markup=False)
            yield Static(self.found, classes="detail output", markup=False)
            yield KeysLine(first=(("Enter", "chooses"),))

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(event.option.id)

    def action_leave(self) -> None:
        self.dismiss(None)
