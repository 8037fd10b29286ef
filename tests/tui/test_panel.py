"""The panel's frame: screens, help, palette, command line."""

import subprocess
import sys

import pytest
from panels import SIZES, go, panel, settle, text

from tui.dialogs.first_run import FirstRun
from tui.dialogs.help import Help
from tui.main import main
from tui.widgets.chart import Chart


def test_the_panel_imports_nothing_heavy():
    heavy = "torch", "transformers", "numpy", "peft", "librosa"
    check = f"import sys, tui.app; found = [m for m in {heavy} if m in sys.modules]; assert not found, found"
    subprocess.run([sys.executable, "-c", check], check=True)


@pytest.mark.parametrize("size", SIZES)
async def test_keys_and_tabs_reach_the_five_screens(root, size):
    app = panel(root)
    async with app.run_test(size=size) as pilot:
        for key, mode in [("5", "ask"), ("4", "monitor"), ("3", "train"), ("2", "upload"), ("1", "merge")]:
            await pilot.press(key)
            await settle(pilot, lambda mode=mode: app.current_mode == mode and app.screen.query(".tab"))
        tab = next(t for t in app.screen.query(".tab") if t.mode == "train")
        await pilot.click(tab)
        await settle(pilot, lambda: app.current_mode == "train" and app.screen.query("#where"))
        await settle(pilot, lambda: "baseline-8f-512px" in text(app, "#where") and "28.5 GB" in text(app, "#where"))


async def test_help_lists_the_keys_and_q_in_it_does_not_quit(root):
    app = panel(root)
    async with app.run_test() as pilot:
        await go(app, pilot, "merge")
        await pilot.press("question_mark")
        await settle(pilot, lambda: isinstance(app.screen, Help))
        keys = dict(app.screen.rows)
        assert keys["m"] == "Start the merge" and keys["4"] == "Go to Monitor" and {"p", "q"} <= set(keys)
        await pilot.press("q")
        await settle(pilot, lambda: not isinstance(app.screen, Help))
        assert app.is_running


@pytest.mark.parametrize("size", SIZES)
async def test_help_says_how_to_leave_it_and_wraps_below_itself(root, size):
    app = panel(root)
    async with app.run_test(size=size) as pilot:
        await pilot.press("1", "question_mark")
        await settle(pilot, lambda: isinstance(app.screen, Help) and app.screen.query(".help-text"))
        await settle(pilot, lambda: app.screen.query_one(".dialog").region.width)
        assert app.screen.query_one(".dialog").border_subtitle == "Esc closes"
        assert {about.region.x for about in app.screen.query(".help-text")} == {
            app.screen.query(".help-key").first().region.right
        }
        await pilot.press("escape")
        await settle(pilot, lambda: not isinstance(app.screen, Help))


async def test_the_palette_offers_what_the_screen_can_do_now(root):
    app = panel(root)
    async with app.run_test() as pilot:
        await go(app, pilot, "merge")
        titles = [command.title for command in app.get_system_commands(app.screen)]
        assert {"Merge", "Monitor", "merge", "audit", "Quit"} <= set(titles)
        assert "stop" not in titles and "Copy selected text" not in titles


async def test_empty_workspace_says_what_to_do(tmp_path):
    app = panel(tmp_path)
    async with app.run_test(size=(120, 36)) as pilot:
        await settle(pilot, lambda: isinstance(app.screen, FirstRun) and app.focused is not None)
        await pilot.press("escape")
        assert app.current_mode == "merge"
        await settle(pilot, lambda: "Choose the Stage-1 checkpoint" in text(app, "#merge-text"))
        await pilot.press("2")
        await settle(pilot, lambda: "Nothing to send" in text(app, "#plan-text"))
        assert "No host is set" in text(app, "#host-text")
        await go(app, pilot, "monitor")
        await settle(pilot, lambda: "No runs yet" in app.screen.query_one(Chart).empty)


def test_bad_command_lines_are_one_line(tmp_path, capsys):
    assert main(["--workspace", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err
    (tmp_path / "surgvqa.toml").write_text("presett = 1\n")
    assert main(["--workspace", str(tmp_path)]) == 2
    assert "did you mean preset" in capsys.readouterr().err
    assert main(["--nope"]) == 2
    assert capsys.readouterr().err == "surgvqa-tui: unrecognized arguments: --nope\n"
