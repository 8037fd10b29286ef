"""panel.toml and keys.toml: what they change, and what is wrong in them in one line."""

import pytest
from panels import go, panel, settle, text
from places import ROOT
from textual.binding import Binding

from surgvqa.errors import UsageError
from tui import keys
from tui.app import Panel
from tui.dialogs.keys_line import KeysLine
from tui.follow.notices import RunNotice
from tui.preferences import Preferences, in_multiplexer, notice, read_preferences, title


def test_preferences_are_read(tmp_path):
    file = tmp_path / "panel.toml"
    assert read_preferences(file) == Preferences()
    file.write_text('notify = "osc9"\ntitle = false\nwebhook = "https://example.org/x"\nmoney = 12\n')
    assert read_preferences(file) == Preferences("osc9", False, "https://example.org/x", 12)


@pytest.mark.parametrize(
    "text, said",
    [
        ("notfy = 1", "unknown key notfy; did you mean notify?"),
        ('notify = "horn"', "notify is 'horn', expected bell, osc9, off"),
        ('title = "yes"', "title is 'yes', expected true or false"),
        ('webhook = "file:///etc/passwd"', "expected an address that begins with https://"),
        ("money = -1", "money is -1, expected dollars above 0"),
        ("money", "not valid TOML"),
    ],
)
def test_what_is_wrong_in_the_preferences_is_named(tmp_path, text, said):
    (tmp_path / "panel.toml").write_text(text)
    with pytest.raises(UsageError, match=r"panel\.toml") as error:
        read_preferences(tmp_path / "panel.toml")
    assert said in str(error.value)


def test_what_goes_to_the_terminal_holds_no_sequence_of_others(monkeypatch):
    attack = "x\x07\x1b]52;c;AAAA\x07"
    assert title(attack) == "\x1b]2;x\\x07\\x1b]52;c;AAAA\\x07\x07" and notice(attack).count("\x07") == 1
    monkeypatch.setenv("TMUX", "/tmp/tmux")
    assert in_multiplexer()


def test_keys_are_read_and_what_is_wrong_is_named(tmp_path):
    file = tmp_path / "keys.toml"
    assert keys.read_keymap(file) == {}
    file.write_text('[monitor]\nstop = "ctrl+s, f2"\n')
    assert keys.read_keymap(file) == {"monitor.stop": "ctrl+s,f2"}
    for written, said in (
        ('[monitor]\nstopp = "x"', "no key [monitor] stopp; did you mean monitor.stop?"),
        ("[monitor]\nstop = 3", "[monitor] stop is 3, expected keys"),
        ('[monitor]\nstop = "e"', "e is the key of monitor.stop and of monitor.evaluate"),
        ('[monitor]\nstop = "q"', "q is the key of panel.quit and of monitor.stop"),
        ("monitor = 1", "expected a table"),
    ):
        file.write_text(written)
        with pytest.raises(UsageError) as error:
            keys.read_keymap(file)
        assert said in str(error.value), error.value


def test_no_key_of_a_place_does_two_things_and_all_are_explained():
    for place, table in keys.TABLE.items():
        names = [one for key in table for one in key.keys.split(",")]
        assert len(names) == len(set(names)), place
        assert all(isinstance(binding, Binding) and binding.id for binding in keys.bindings(place))
    page = (ROOT / "docs/keys.md").read_text()
    assert page.endswith(keys.markdown()), "make screenshots"
    assert "| `s` | Save a checkpoint and end the run | `monitor.stop` |" in page and "| `F5` |" in page


async def test_a_remapped_key_works_and_is_shown(root):
    app = Panel(panel(root).session.here, keymap={"panel.monitor": "f3"})
    async with app.run_test() as pilot:
        await settle(pilot, lambda: app.front is not None and app.front.is_mounted)
        await pilot.press("4")
        assert app.current_mode == "merge"
        await pilot.press("f3")
        await settle(pilot, lambda: app.current_mode == "monitor" and app.front is not None)
        shown = {app.get_key_display(active.binding) for active in app.front.working_keys()}
        assert "f3" in {key.lower() for key in shown}


@pytest.mark.parametrize("keymap, line", [
    ({}, "Enter chooses   / filter   z sort   Esc leaves it"),
    ({"host_list.leave": "ctrl+l"}, "Enter chooses   / filter   z sort   Ctrl+l leaves it"),
])  # fmt: skip
async def test_a_dialog_shows_its_own_keys_as_they_are_mapped(root, keymap, line):
    app = Panel(panel(root).session.here, keymap=keymap)
    async with app.run_test() as pilot:
        await go(app, pilot, "train")
        await pilot.press("h")
        await settle(pilot, lambda: app.screen.query(KeysLine) and app.screen.query_one(KeysLine).content)
        assert str(app.screen.query_one(KeysLine).content) == line


async def test_news_ring_and_stand_on_the_screen_in_front(root, monkeypatch):
    app = panel(root)
    rung = []
    async with app.run_test() as pilot:
        await go(app, pilot, "upload")
        monkeypatch.setattr(app, "bell", lambda: rung.append(1))
        app.tell(RunNotice("sweep: finished", "success"))
        await app.notify_of_runs()
        assert rung == [1] and "sweep: finished" in text(app, "#notice")
