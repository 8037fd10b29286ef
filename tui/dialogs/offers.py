"""Machines to rent: the price list, and whether one is rented for the whole way or alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import OptionList, Static

from surgvqa.untrusted import one_line
from tui import keys, words
from tui.dialogs.keys_line import KeysLine
from tui.widgets.filtered import FilteredList

LOCAL = {"type": "local", "gpu": "this computer, to try it for nothing", "price_per_hour": 0.0, "regions": ["here"]}
TYPE, GPU = 24, 30


@dataclass(frozen=True)
class Wanted:
    """What was chosen."""

    type: str
    price_per_hour: float
    region: str
    whole_way: bool
    """Set up, upload, train, evaluate, bring home and end it; else the machine alone."""


def _number(offer: dict[str, Any], name: str) -> float:
    """A figure of an offer; unknown ones come last."""
    value = offer.get(name)
    return float(value) if isinstance(value, (int, float)) else float("inf")


class OfferList(FilteredList[tuple[int, dict[str, Any]]]):
    """Machines, each with its number in the price list."""

    orders: ClassVar[dict[str, Callable[[tuple[int, dict[str, Any]]], Any]]] = {
        "as listed": lambda item: 0,
        "price an hour": lambda item: _number(item[1], "price_per_hour"),
        "cost of the training": lambda item: _number(item[1], "cost"),
        "time of the training": lambda item: _number(item[1], "seconds"),
        "free first": lambda item: not item[1].get("regions"),
    }

    def key(self, item: tuple[int, dict[str, Any]]) -> str:
        return str(item[0])

    def row(self, item: tuple[int, dict[str, Any]]) -> Content:
        _, offer = item
        kind, gpu = one_line(str(offer.get("type"))), one_line(str(offer.get("gpu")))
        regions = ", ".join(one_line(str(region)) for region in offer.get("regions") or [])
        fits = {False: "  does not fit", True: "  fits"}.get(offer.get("fits", ""), "")
        seconds, cost = offer.get("seconds"), offer.get("cost")
        if isinstance(seconds, (int, float)) and isinstance(cost, (int, float)):
            fits += f"  about {words.seconds(seconds)}, {words.price(cost)}"
        price = words.price(float(offer.get("price_per_hour") or 0.0), "/h")
        return Content.assemble(
            (f"{words.clip(kind, TYPE - 1):<{TYPE}}", "bold" if regions else "$muted"),
            f"{words.clip(gpu, GPU - 1):<{GPU}}{price:>9}",
            (f"{fits}  {regions or 'none free'}", "$muted"),
        )


class Offers(ModalScreen[Wanted | None]):
    """The price list, as `surgvqa-remote offers --json` has it. Enter goes the whole way."""

    BINDINGS: ClassVar[list[BindingType]] = keys.bindings("offers")

    def __init__(self, offers: list[dict[str, Any]], problem: str) -> None:
        """`problem`: why the provider's list is not here; ''."""
        super().__init__()
        self.offers, self.problem = [*offers, LOCAL], problem

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog wide"):
            yield Static("Rent which machine?", classes="question", markup=False)
            offers = OfferList(id="offers")
            yield offers
            yield offers.search
            yield Static(self.problem, classes="detail", markup=False)
            yield KeysLine(first=(("Enter", "the whole way: train, bring home, end it"),))

    def on_mount(self) -> None:
        listed = self.query_one(OfferList)
        listed.show(list(enumerate(self.offers)))
        listed.focus()

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        self._choose(str(event.option.id), whole_way=True)

    def action_alone(self) -> None:
        option = self.query_one(OfferList).highlighted_option
        if option is not None:
            self._choose(str(option.id), whole_way=False)

    def _choose(self, number: str, whole_way: bool) -> None:
        offer = self.offers[int(number)]
        if not offer.get("regions"):
            self.query_one(".detail", Static).update(Content("None of this type is free now."))
            return
        price = float(offer.get("price_per_hour") or 0.0)
        self.dismiss(Wanted(str(offer["type"]), price, str(offer["regions"][0]), whole_way))

    def action_leave(self) -> None:
        self.dismiss(None)
