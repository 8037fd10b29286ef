"""Titles of panels. Textual reads a title given as `str` as markup, so every title goes through here."""

from __future__ import annotations

from textual.content import Content
from textual.widget import Widget

from surgvqa.untrusted import one_line


def set_title(widget: Widget, text: str) -> None:
    """`text` in the upper border, character by character: names of runs stand there."""
    title = Content(one_line(text))
    if widget.border_title != title.markup:  # each assignment draws the widget anew, with all that is in it
        widget.border_title = title


def set_subtitle(widget: Widget, text: str) -> None:
    """`text` in the lower border, character by character."""
    title = Content(one_line(text))
    if widget.border_subtitle != title.markup:
        widget.border_subtitle = title
