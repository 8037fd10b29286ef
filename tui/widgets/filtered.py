"""What all lists share: `/` shows only the rows with some text, `z` sorts them another way."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from textual.binding import BindingType
from textual.content import Content
from textual.widget import Widget
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from tui import keys
from tui.widgets.search import Search
from tui.widgets.titles import set_subtitle

Item = TypeVar("Item")

# Not a widget when it runs: Textual takes styles and keys from a widget's first base that is one.
if TYPE_CHECKING:

    class _Mixin(Widget): ...

else:
    _Mixin = object


class Filtered(_Mixin):
    """What makes a widget a list or table with a filter; it stands before the widget among the bases, which names the
    keys of "list". Whoever composes it also yields `search`, the line in which one types."""

    sorts: tuple[str, ...] = ("as listed",)
    """Names of the orders; the first is the one that it has."""

    def __init__(self, *, id: str, classes: str = "", **more: Any) -> None:
        super().__init__(id=id, classes=classes, **more)
        self.wanted = ""
        self.sort = self.sorts[0]
        self.search = Search(
            "only rows with …", done=self.filter, typed=self.filter, left=self._back, id=f"{id}-search"
        )

    def redraw(self) -> None:
        """Draws what passes the filter, in the order of `sort`."""
        raise NotImplementedError

    def passes(self, text: str) -> bool:
        """Whether a row that holds this text is shown."""
        return self.wanted in text.lower()

    def filter(self, wanted: str) -> None:
        """Only the rows that hold this; '' shows all."""
        self.wanted = wanted.strip().lower()
        self.redraw()

    def _back(self) -> None:
        self.screen.set_focus(self)

    def show_filter(self, shown: int, total: int, also: str = "") -> None:
        """Filter, order and number of rows, in the nearest border."""
        count = f"{shown} of {total}" if self.wanted else f"{total}" if total else ""
        parts = [
            also,
            f"by {self.sort}" if self.sort != self.sorts[0] else "",
            f"/{self.wanted}" if self.wanted else "",
        ]
        bordered = next(
            (w for w in self.ancestors_with_self if isinstance(w, Widget) and w.styles.border_bottom[0]), self
        )
        set_subtitle(bordered, " · ".join(part for part in [*parts, count] if part))

    def action_filter(self) -> None:
        """Opens the line in which one types; the list follows each letter."""
        self.search.ask()

    def action_sort(self) -> None:
        """The next order."""
        self.sort = self.sorts[(self.sorts.index(self.sort) + 1) % len(self.sorts)]
        self.redraw()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action == "sort":
            return len(self.sorts) > 1
        return super().check_action(action, parameters)


class FilteredList(Filtered, OptionList, Generic[Item]):
    """A list of which one row is chosen; the highlight stays on its row, whatever comes and goes around it."""

    BINDINGS: ClassVar[list[BindingType]] = keys.bindings("list")

    orders: ClassVar[dict[str, Callable[[Any], Any]]] = {"as listed": lambda item: 0}
    """What each order sorts by."""

    def __init__(self, *, id: str, classes: str = "") -> None:
        self.sorts = tuple(self.orders)
        super().__init__(id=id, classes=classes, markup=False)
        self.items: list[Item] = []
        self._rows: dict[str, Content] = {}

    def key(self, item: Item) -> str:
        """The row's id."""
        raise NotImplementedError

    def text(self, item: Item) -> str:
        """What the filter looks at."""
        return self.row(item).plain

    def row(self, item: Item) -> Content:
        """How it is drawn."""
        raise NotImplementedError

    def show(self, items: Iterable[Item], chosen: str | None = None) -> None:
        """Draws these; `chosen` is highlighted where nothing is yet."""
        self.items = list(items)
        self.redraw(chosen)

    def redraw(self, chosen: str | None = None) -> None:
        shown = sorted((item for item in self.items if self.passes(self.text(item))), key=self.orders[self.sort])
        rows = {self.key(item): self.row(item) for item in shown}
        if list(rows) == list(self._rows):
            for id, row in rows.items():
                if row != self._rows[id]:
                    self.replace_option_prompt(id, row)
        else:
            at = self.highlighted_option.id if self.highlighted_option else chosen
            self.clear_options()
            self.add_options([Option(row, id=id) for id, row in rows.items()])
            if rows:
                self.highlighted = list(rows).index(at) if at in rows else 0
        self._rows = rows
        self.show_filter(len(rows), len(self.items), self.also())

    def also(self) -> str:
        """What else the border says."""
        return ""
