"""Every list: `/` shows the rows with some text, `z` sorts them; what is chosen is what is seen."""

from __future__ import annotations

from panels import panel, settle
from textual.app import App

from tui.dialogs.hosts import RENT, HostList, HostPicker
from tui.dialogs.keys_line import KeysLine
from tui.dialogs.offers import OfferList, Offers, Wanted

HOSTS = """
[lambda-a]
price_per_hour = 2.5
[office]
[lambda-b]
price_per_hour = 0.75
"""
OFFERS = [
    {"type": "gpu_1x_h100", "gpu": "H100", "price_per_hour": 2.5, "regions": ["us-east-1"]},
    {"type": "gpu_1x_a100", "gpu": "A100", "price_per_hour": 1.25, "regions": ["us-west-1"]},
    {"type": "gpu_1x_a10", "gpu": "A10", "price_per_hour": 0.75, "regions": []},
]


def rows(listed) -> list[str]:
    return [str(option.id) for option in listed.options]


async def test_hosts_are_filtered_and_sorted(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    workspace = tmp_path / "ws"
    workspace.mkdir()
    (workspace / "surgvqa.toml").write_text("")
    (workspace / "hosts.toml").write_text(HOSTS)
    app = panel(workspace)
    async with app.run_test() as pilot:
        await settle(pilot, lambda: app.front is not None and app.front.is_mounted)
        await pilot.press("h")
        await settle(
            pilot, lambda: isinstance(app.screen, HostPicker) and app.focused is app.screen.query_one(HostList)
        )
        listed = app.screen.query_one(HostList)
        here = app.session.here.name
        assert rows(listed) == [here, "lambda-a", "office", "lambda-b", RENT] and listed.highlighted == 0
        await pilot.press("slash", *"LAMBDA")
        await settle(pilot, lambda: rows(listed) == ["lambda-a", "lambda-b"])
        await pilot.press("enter", "down")
        await settle(pilot, lambda: app.focused is listed and listed.highlighted == 1)
        await pilot.press("z", "z")
        await settle(pilot, lambda: rows(listed) == ["lambda-b", "lambda-a"])  # by price
        assert listed.highlighted == 0, "the highlight stays on its host"
        await pilot.press("slash", "escape")
        await settle(pilot, lambda: len(rows(listed)) == 5 and app.focused is listed)
        assert isinstance(app.screen, HostPicker), "Esc left the filter, not the list"
        await pilot.press("escape")
        await settle(pilot, lambda: not isinstance(app.screen, HostPicker))


async def test_the_offer_that_is_highlighted_is_the_one_that_is_rented():
    answers: list[Wanted | None] = []

    class Shown(App[None]):
        def on_mount(self) -> None:
            self.push_screen(Offers(OFFERS, ""), answers.append)

    app = Shown()
    async with app.run_test() as pilot:
        await settle(pilot, lambda: isinstance(app.screen, Offers) and app.focused is app.screen.query_one(OfferList))
        listed = app.screen.query_one(OfferList)
        assert rows(listed) == ["0", "1", "2", "3"]
        await settle(pilot, lambda: "/ filter   z sort" in str(app.screen.query_one(KeysLine).content))
        await pilot.press("slash", *"1x_a1", "enter", "z")  # by price
        await settle(pilot, lambda: rows(listed) == ["2", "1"] and listed.highlighted is not None)
        await pilot.press("home", "enter")
        await settle(pilot, lambda: "None of this type is free" in str(app.screen.query_one(".detail").content))
        await pilot.press("end", "enter")
        await settle(pilot, lambda: answers)
    (wanted,) = answers
    assert wanted and wanted.type == "gpu_1x_a100" and wanted.whole_way
