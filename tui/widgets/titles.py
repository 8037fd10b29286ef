"""Titles of panels. Textual reads a title given as `str` as markup, so every title goes through here."""

from __future__ import annotations

from textual.content import Content
from textual.widget import Widget

from surgvqa.untrusted import one_line


def set_title(widget: Widget, text: str) -> None:
    """`text` in the upper border, character by character: names of runs stand there."""
    widget.border_title = Content(one_line(text))


def set_subtitle(widget: Widget, text: str) -> None:
    """`text` in the lower border, character by character."""
    widget.border_subtitle = Content(one_line(text))
