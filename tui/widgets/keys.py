"""The footer: the keys that work now. Help and quit stand at its right end, however many others there are."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.screen import Screen
from textual.widgets import Footer

from tui.textual_internals import FooterKey


class Keys(Footer):
    """Textual's footer with a right end that is never cut off."""

    ALWAYS: ClassVar[tuple[str, ...]] = ("help", "quit")

    _drawn: tuple[object, ...] = ()

    def bindings_changed(self, screen: Screen) -> None:
        """Draws it anew when other keys are shown: composing it costs more than all else that a key does."""
        shown = tuple(
            (active.binding.key, active.binding.description, active.enabled)
            for active in screen.active_bindings.values()
            if active.binding.show
        )
        if shown != self._drawn:
            self._drawn = shown
            super().bindings_changed(screen)

    def compose(self) -> ComposeResult:
        last = []
        for key in super().compose():
            if isinstance(key, FooterKey) and key.action in self.ALWAYS:
                last.append(key)
            else:
                yield key
        yield Horizontal(*last, classes="always")
