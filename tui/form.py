"""Settings one can edit in place. Until Enter is pressed no field is an input, so that the letter keys stay keys."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.content import Content
from textual.message import Message
from textual.suggester import Suggester
from textual.widget import Widget
from textual.widgets import Input, Static

from tui import words


class PathSuggester(Suggester):
    """Completes the path that is being typed, relative to the workspace."""

    def __init__(self, root: Path) -> None:
        super().__init__(use_cache=False, case_sensitive=True)
        self.root = root

    async def get_suggestion(self, value: str) -> str | None:
        folder, _, start = value.rpartition("/")
        base = Path(self.root, os.path.expanduser(folder + "/" if folder or value.startswith("/") else "."))
        try:
            with os.scandir(base) as entries:
                names = sorted(
                    e.name + ("/" if e.is_dir() else "")
                    for e in entries
                    if e.name.startswith(start) and (start or not e.name.startswith("."))
                )
        except OSError:
            return None
        return (
            f"{folder}/{names[0]}"
            if names and folder
            else (("/" if value.startswith("/") else "") + names[0] if names else None)
        )


class Field(Widget, can_focus=True):
    """One setting: its name, its value, and where the value comes from."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "edit", "edit")]

    class Edited(Message):
        """The user typed a new value."""

        def __init__(self, field: Field, text: str) -> None:
            super().__init__()
            self.field, self.text = field, text

    class Focused(Message):
        """The user moved here."""

        def __init__(self, field: Field) -> None:
            super().__init__()
            self.field = field

    def __init__(self, name: str, label: str | None = None, *, is_path: bool = False, help: str = "") -> None:
        super().__init__(id=f"field-{name}")
        self.key, self.label, self.is_path, self.help = name, label or name, is_path, help
        self.text = self.origin = ""

    def compose(self) -> ComposeResult:
        with Horizontal():
            yield Static(self.label, classes="label", markup=False)
            yield Static("", classes="value", markup=False)
            yield Static("", classes="origin", markup=False)

    def show(self, text: str, origin: str, problem: bool = False) -> None:
        """The value and its source."""
        self.text, self.origin = text, origin
        self.set_class(origin == "edited here", "edited")
        self.set_class(problem, "problem")
        if self.is_mounted:
            self._draw()

    def on_mount(self) -> None:
        self._draw()

    def on_resize(self) -> None:
        self._draw()

    def on_focus(self) -> None:
        self.post_message(self.Focused(self))

    def _draw(self) -> None:
        value, origin = self.query_one(".value", Static), self.query_one(".origin", Static)
        shown = words.clip(self.text, max(8, value.size.width), keep_end=self.is_path)
        value.update(Content(shown) if self.text else Content.assemble(("not set", "$muted")))
        origin.update(Content(self.origin))

    async def action_edit(self) -> None:
        if self.query(Input):
            return
        suggester = PathSuggester(self.screen.workspace_root) if self.is_path else None  # type: ignore[attr-defined]
        editor = Input(self.text, compact=True, suggester=suggester, select_on_focus=False)
        await self.query_one(Horizontal).mount(editor, after=self.query_one(".label"))
        self.add_class("editing")
        editor.focus()

    async def on_click(self) -> None:
        await self.action_edit()

    @on(Input.Submitted)
    async def _keep(self, event: Input.Submitted) -> None:
        event.stop()
        await self._leave()
        if event.value.strip() != self.text:
            self.post_message(self.Edited(self, event.value.strip()))

    async def on_key(self, event: events.Key) -> None:
        if event.key == "escape" and self.query(Input):
            event.stop()
            await self._leave()

    async def _leave(self) -> None:
        await self.query(Input).remove()
        self.remove_class("editing")
        self.focus()


class Form(VerticalScroll, can_focus=False):
    """Fields below each other; up and down move between them."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", "previous", show=False),
        Binding("down,j", "move(1)", "next", show=False),
    ]

    def action_move(self, by: int) -> None:
        fields = list(self.query(Field))
        here = next((i for i, field in enumerate(fields) if field.has_focus_within), None)
        if fields:
            fields[0 if here is None else (here + by) % len(fields)].focus()

    def field(self, name: str) -> Field:
        """The field of a setting."""
        return self.query_one(f"#field-{name}", Field)

    @on(Field.Focused)
    def _bring_into_view(self, event: Field.Focused) -> None:
        if event.field is self.query(Field).first():  # its heading too
            self.scroll_home(animate=False)
        else:
            event.field.scroll_visible(animate=False)
