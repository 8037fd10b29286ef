"""The last line of a dialog: its keys, as they are mapped now."""

from __future__ import annotations

from collections.abc import Mapping

from textual.content import Content
from textual.widgets import Static

from tui import keys
from tui.widgets.filtered import Filtered


class KeysLine(Static):
    """Each key of the dialog once, with what it does. `labels` says it better for some, by the keys' names in the table
    of keys; `first` are those of Textual's own list."""

    def __init__(self, labels: Mapping[str, str] = {}, first: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(classes="keys", markup=False)
        self.labels, self.first = labels, first

    def on_mount(self) -> None:
        self.call_after_refresh(self.show)

    def show(self) -> None:
        """Draws it, once it is known which list of the dialog has the focus."""
        shown, done = list(self.first), set()
        for active in self.screen.active_bindings.values():
            binding, its_own = active.binding, active.node is self.screen or isinstance(active.node, Filtered)
            if binding.id and its_own and active.enabled and binding.action not in done:  # Textual's own have no id
                done.add(binding.action)
                name = binding.id.rpartition(".")[2]
                shown.append((keys.sign(binding.key), self.labels.get(name, binding.description)))
        parts = [part for key, text in shown for part in ((key, "$footer-key-foreground"), f" {text}   ")]
        self.update(Content.assemble(*parts).rstrip())
