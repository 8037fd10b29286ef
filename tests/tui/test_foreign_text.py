"""Text from outside (names, paths, errors, host names, log lines) is shown as it stands: no markup, no escapes."""

import re

import pytest
from panels import SIZES, panel, settle, text, timeline, training
from places import ROOT
from rich.segment import Segment
from textual.color import Color
from textual.content import Content
from textual.widgets import OptionList

from surgvqa.runs.folder import Run
from tui.dialogs.confirm import Confirm
from tui.dialogs.help import Help
from tui.screens.monitor import MonitorScreen
from tui.widgets.plain_text import PlainText

NAMES = ["sweep [lr=2e-4]", "ablation [no audio]", "[@click=app.quit]click me[/]", "[/x] closed"]
ATTACK = "before\x1b]52;c;aGVsbG8=\x07 \x1b[2J\x9b31m\u202eafter"


def drawn(app) -> str:
    """All that the screen draws, borders and titles too."""
    lines = app.screen._compositor.render_strips()
    return "\n".join("".join(segment.text for segment in strip) for strip in lines)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
async def test_a_run_name_with_brackets_is_shown_whole(root, name, size):
    training(root, name=name)
    app = panel(root)
    async with app.run_test(size=size) as pilot:
        await settle(pilot, lambda: isinstance(app.screen, MonitorScreen) and timeline(app))
        await settle(pilot, lambda: name in drawn(app))
        assert not [segment for strip in app.screen._compositor.render_strips() for segment in strip
                    if segment.style and "@click" in segment.style.meta]  # fmt: skip
        assert app.is_running


@pytest.mark.parametrize("mode", ["1", "2", "3", "4", "5"])
async def test_no_widget_and_no_title_sends_what_a_terminal_obeys(root, mode):
    """Whatever reaches a screen's texts, titles, notices, lists and logs, by whichever way."""
    run = training(root, name="x")
    run.emit("warning", text=ATTACK)
    (run.folder / "log.txt").write_text(f"{ATTACK}\n")
    app = panel(root)
    async with app.run_test(size=(120, 36)) as pilot:
        await settle(pilot, lambda: isinstance(app.screen, MonitorScreen) and timeline(app))
        await pilot.press(mode)
        await settle(pilot, lambda: app.current_mode == ["merge", "upload", "train", "monitor", "ask"][int(mode) - 1])
        for widget in app.screen.query("*"):
            widget.border_title = widget.border_subtitle = Content(ATTACK)
            if hasattr(widget, "update"):
                widget.update(Content(ATTACK))
            if isinstance(widget, OptionList):
                widget.add_option(Content(ATTACK))
        app.screen.say(ATTACK, "error")
        await settle(pilot, lambda: "before" in drawn(app) and "after" in drawn(app))
        assert not re.findall("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", drawn(app))


async def test_dialogs_show_foreign_text_as_it_stands(root):
    app = panel(root)
    async with app.run_test(size=(120, 36)) as pilot:
        for dialog in (Confirm(NAMES[0], ATTACK, NAMES[2]), Help(NAMES[0], ATTACK, [("k", NAMES[2])])):
            app.push_screen(dialog)
            await settle(pilot, lambda dialog=dialog: app.screen is dialog and NAMES[0] in drawn(app))
            assert NAMES[2] in drawn(app) and "\x1b" not in drawn(app)
            await pilot.press("escape")
            await settle(pilot, lambda dialog=dialog: app.screen is not dialog)


async def test_an_error_with_brackets_is_shown_whole(root):
    with Run.create(root / "runs", "train") as run:
        run.emit("error", text=f"file {NAMES[0]}: not found [/]")
    app = panel(root)
    async with app.run_test(size=(120, 36)) as pilot:
        await settle(pilot, lambda: app.current_mode is not None and app.front is not None)
        app.front.say(f"file {NAMES[2]}: not found [/]", "error")
        assert NAMES[2] in text(app, "#notice")


def test_titles_go_through_one_door():
    """Textual takes a title that is a str as markup."""
    found = [
        f"{file.relative_to(ROOT)}:{number}"
        for file in (ROOT / "tui").rglob("*.py")
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if re.search(r"border_(sub)?title\s*=[^=]", line) and file.name != "titles.py" and '= "Esc closes"' not in line
    ]
    assert not found
    statics = [
        f"{file.relative_to(ROOT)}:{number}"
        for file in (ROOT / "tui").rglob("*.py")
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if re.search(r"\bStatic\((?!Content|\s*$)", line) and "markup=False" not in line and "class " not in line
    ]
    assert not statics


def test_the_filter_keeps_the_styles_and_leaves_ordinary_text_alone():
    same = Segment("plain")
    kept, cleaned = PlainText().apply([same, Segment("a\x1bb")], Color(0, 0, 0))
    assert kept is same and cleaned.text == "ab"
