"""Settings one can edit in place. Until Enter is pressed no field is an input, so that the letter keys stay keys."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import ClassVar

from textual import on
from textual.binding import BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.message import Message
from textual.suggester import Suggester
from textual.widget import Widget
from textual.widgets import Input

from tui import keys, words
from tui.settings.settings import EDITED, Settings


class PathSuggester(Suggester):
    """Completes the path that is being typed, relative to the workspace."""

    def __init__(self, root: Path) -> None:
        super().__init__(use_cache=False, case_sensitive=True)
        self.root = root

    async def get_suggestion(self, value: str) -> str | None:
        folder, slash, start = value.rpartition("/")
        folder += slash
        try:
            with os.scandir(Path(self.root, os.path.expanduser(folder))) as entries:
                names = [entry.name + "/" * entry.is_dir() for entry in entries if entry.name.startswith(start)]
        except OSError:
            return None
        shown = sorted(name for name in names if start or not name.startswith("."))
        return folder + shown[0] if shown else None


class Editor(Input):
    """The input of a field that is being edited; its keys stand in the footer. Moving on keeps what was typed."""

    BINDINGS: ClassVar[list[BindingType]] = keys.bindings("editor")

    def __init__(self, text: str, suggester: Suggester | None) -> None:
        super().__init__(text, suggester=suggester, compact=True, select_on_focus=False)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        return self.suggester is not None if action == "complete" else True

    def action_complete(self) -> None:
        """Takes in what is proposed behind the cursor."""
        self.action_end()
        self.action_cursor_right()

    async def action_submit(self) -> None:
        """At once, and not by a message: the keys after Enter are for what has the focus then."""
        assert isinstance(self.parent, Field)
        await self.parent.keep(self.value)

    async def action_leave(self) -> None:
        assert isinstance(self.parent, Field)
        await self.parent.leave()

    async def on_blur(self) -> None:
        """The user went elsewhere on this screen; another window in front of the terminal is no leaving."""
        if self.app.app_focus and isinstance(self.parent, Field) and self.app.screen is self.screen:
            await self.parent.keep(self.value)


class Field(Widget, can_focus=True):
    """One setting on one line: its name, its value, and where the value comes from. Drawn whole: there are many."""

    BINDINGS: ClassVar[list[BindingType]] = keys.bindings("field")

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

    def __init__(
        self, name: str, label: str = "", *, width: int, is_path: bool = False, help: str = "", group: str = ""
    ) -> None:
        super().__init__(id=f"field-{name}")
        self.key, self.label, self.label_width = name, label or name, width
        self.is_path, self.help, self.group = is_path, help, group
        self.text = self.origin = ""
        self.problem = False
        self.editor: Editor | None = None
        """While it is being edited."""
        self.range = self.refusal = ""
        """What values it takes; what is wrong with the text that is being typed."""
        self.problem_with: Callable[[str], str] = lambda text: ""

    def show(self, text: str, origin: str, problem: bool = False) -> None:
        """The value and its source; a problem draws the eye to the source."""
        self.text, self.origin, self.problem = text, origin, problem
        self.refresh()

    def render(self) -> Content:
        if self.editor is not None:
            hint = words.clip(self.refusal or self.range, self._hint_width)
            space = max(0, self.size.width - self.label_width - len(hint))
            style = "bold $error" if self.refusal else "$muted"
            return Content.assemble((f"{self.label:<{self.label_width}}", "bold"), " " * space, (hint, style))
        edited = self.origin == EDITED
        label = "bold" if self.has_focus_within else "$foreground 75%"
        origin = "$warning" if self.problem else "$accent" if edited else "$muted"
        room = max(8, self.size.width - self.label_width - len(self.origin) - 2)
        shown = words.clip(self.text, room, keep_end=self.is_path) if self.text else "not set"
        return Content.assemble(
            (f"{self.label:<{self.label_width}}", label),
            (f"{shown:<{room}} ", "$muted" if not self.text else "$accent" if edited else ""),
            (self.origin, origin),
        )

    @property
    def _hint_width(self) -> int:
        """Columns beside the editor for what values the setting takes, or what is wrong."""
        return max(0, min(44, (self.size.width - self.label_width) * 2 // 3)) if self.range else 0

    @on(Input.Changed)
    def _typed(self, event: Input.Changed) -> None:
        event.stop()
        refusal = self.problem_with(event.value)
        if self.editor is not None and refusal != self.refusal:
            self.refusal = refusal
            self.refresh()

    def on_focus(self) -> None:
        self.refresh()
        self.post_message(self.Focused(self))

    def on_blur(self) -> None:
        self.refresh()

    async def action_edit(self, text: str | None = None) -> None:
        """Opens the editor, with its text selected, so that typing replaces it; `text` is what was typed before and was
        refused: typing goes on at its end."""
        if self.editor is not None:
            return
        suggester = PathSuggester(self.screen.workspace_root) if self.is_path else None  # type: ignore[attr-defined]  # a PanelScreen
        self.editor = Editor(self.text if text is None else text, suggester)
        self.refusal = "" if text is None else self.problem_with(text)
        hint = self._hint_width
        self.editor.styles.margin = (0, hint + 1 if hint else 0, 0, self.label_width)
        if text is None:
            self.editor.select_all()
        await self.mount(self.editor)
        self.screen.set_focus(self.editor)  # now, not with the next message: the next key may wait already

    async def on_click(self) -> None:
        await self.action_edit()

    async def keep(self, text: str) -> None:
        """Ends editing and hands on what was typed."""
        if self.editor is None:
            return
        await self.leave()
        if text.strip() != self.text:
            self.post_message(self.Edited(self, text.strip()))

    async def leave(self) -> None:
        """Ends editing; what was typed is dropped."""
        editor, self.editor = self.editor, None
        if editor is not None:
            if self.screen.focused is editor:
                self.screen.set_focus(self)
            await editor.remove()


class Form(VerticalScroll, can_focus=False):
    """Fields below each other; up and down move between them."""

    BINDINGS: ClassVar[list[BindingType]] = keys.bindings("form")

    def action_move(self, by: int) -> None:
        fields = [field for field in self.query(Field) if field.display]
        here = next((i for i, field in enumerate(fields) if field.has_focus_within), None)
        if fields:
            self.screen.set_focus(fields[0 if here is None else (here + by) % len(fields)])

    def field(self, name: str) -> Field:
        """The field of a setting."""
        return self.query_one(f"#field-{name}", Field)

    @on(Field.Focused)
    def _bring_into_view(self, event: Field.Focused) -> None:
        if event.field is self.query(Field).first():  # its heading too
            self.scroll_home(animate=False)
        else:
            event.field.scroll_visible(animate=False)

    def fill(self, settings: Settings, preset: str | None) -> None:
        """Shows every field's value and where it comes from."""
        resolved, missing = settings.resolve(preset)
        for row in self.query(Field):
            source = resolved.sources.get(row.key, "")
            origin = EDITED if row.key in settings.edited else source.removeprefix("preset ")
            text = settings.edited.get(
                row.key, words.value(getattr(resolved.options, row.key), settings.workspace.root)
            )
            row.range, row.problem_with = settings.range_of(row.key), partial(settings.problem_with, row.key)
            row.show(text, "required" if row.key in missing else origin, problem=row.key in missing)
