"""The footer keeps help and quit at every width."""

import pytest
from panels import go, panel, settle, training

from tui.widgets.keys import Keys


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("mode", ["train", "monitor"])
async def test_help_and_quit_are_never_cut_off(root, width, mode):
    training(root).emit("warning", text="x")
    app = panel(root)
    async with app.run_test(size=(width, 24)) as pilot:
        await go(app, pilot, mode)
        await settle(pilot, lambda: app.screen.query(".always FooterKey"))
        always = list(app.screen.query_one(Keys).query(".always FooterKey"))
        await settle(pilot, lambda: always[-1].region.right <= width and always[0].region.width)
        assert [key.action for key in always] == ["help", "quit"]
