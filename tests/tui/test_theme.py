"""The panel in every theme that Textual offers, and the choice kept between starts."""

import pytest
from panels import panel, settle, text, training
from textual.color import Color
from textual.theme import BUILTIN_THEMES

from surgvqa.config.workspace import load_workspace
from tui.app import Panel
from tui.screens.monitor import MonitorScreen
from tui.targets.local import LocalTarget
from tui.theme import variables_of


async def test_every_theme_draws_every_screen(root):
    training(root)
    app = panel(root)
    async with app.run_test(size=(120, 36)) as pilot:
        await settle(pilot, lambda: isinstance(app.screen, MonitorScreen) and "running" in text(app, "#facts"))
        for name in app.available_themes:
            app.theme = name
            await settle(pilot, lambda name=name: app.theme == name and "muted" in app.theme_variables)
            assert app.is_running
        for key in "1234":
            await pilot.press(key)
            await settle(pilot, lambda: app.export_screenshot())


@pytest.mark.parametrize("name", [name for name, theme in BUILTIN_THEMES.items() if not theme.ansi])
def test_muted_text_can_be_read_on_every_theme(name):
    theme = BUILTIN_THEMES[name]
    ground = Color.parse(theme.to_color_system().generate()["background"])
    assert abs(ground.brightness - Color.parse(variables_of(theme)["muted"]).brightness) > 0.25


async def test_the_theme_is_kept_between_starts(root, tmp_path):
    file = tmp_path / "config" / "theme"
    app = Panel(LocalTarget(load_workspace(root)), theme_file=file)
    async with app.run_test() as pilot:
        app.theme = "textual-light"
        await settle(pilot, file.is_file)
    assert Panel(LocalTarget(load_workspace(root)), theme_file=file).theme == "textual-light"
    file.write_text("no such theme\n")
    assert Panel(LocalTarget(load_workspace(root)), theme_file=file).theme == "surgvqa"
