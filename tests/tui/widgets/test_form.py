"""Editing a setting: the text is selected, ranges and what is wrong stand beside it, and quitting asks."""

import pytest
from panels import go, panel, settle, text
from textual.events import Key, Paste

from surgvqa.config.workspace import load_workspace
from surgvqa.errors import UsageError
from tui.dialogs.confirm import Confirm
from tui.settings.settings import Settings
from tui.widgets.form import Editor, Field


@pytest.mark.parametrize(
    "name, typed",
    [("max_steps", "-160"), ("max_steps", "0"), ("learning_rate", "-5"), ("learning_rate", "1e99"),
     ("learning_rate", "nan"), ("warmup_ratio", "7"), ("lora_r", "0"), ("budget_gb", "-2")],
)  # fmt: skip
def test_a_value_out_of_bounds_is_refused_with_what_is_expected(root, name, typed):
    settings = Settings("train", load_workspace(root))
    with pytest.raises(UsageError, match=f"{name} is '?{typed}'?, expected "):
        settings.edit(name, typed)
    assert settings.edited == {}
    assert settings.problem_with(name, typed).startswith("expected ")


def test_checking_a_text_keeps_what_was_edited(root):
    settings = Settings("train", load_workspace(root))
    settings.edit("lora_r", "8")
    assert settings.problem_with("lora_r", "16") == "" and settings.edited == {"lora_r": "8"}


async def test_typing_replaces_the_value_and_a_wrong_one_is_said_beside_it(root):
    app = panel(root)
    async with app.run_test(size=(120, 36)) as pilot:
        await pilot.press("3")
        await settle(pilot, lambda: app.current_mode == "train" and app.screen.query("#field-max_steps"))
        field = app.screen.query_one("#field-max_steps", Field)
        field.focus()
        await pilot.press("enter")
        await settle(pilot, lambda: app.screen.query(Editor))
        assert "at least 1" in str(field.render())
        await pilot.press("0")
        await settle(pilot, lambda: "expected at least 1" in str(field.render()))
        await pilot.press("backspace", "6", "0", "enter")
        await settle(pilot, lambda: app.screen.settings.edited == {"max_steps": "60"})
        assert text(app, "#notice") == ""


@pytest.mark.parametrize("answer", ["n", "y"])
async def test_q_asks_when_edits_would_be_lost(root, answer):
    app = panel(root)
    async with app.run_test(size=(120, 36)) as pilot:
        await pilot.press("3")
        await settle(pilot, lambda: app.current_mode == "train" and app.screen.query("#field-max_steps"))
        app.screen.settings.edit("max_steps", "60")
        await pilot.press("q")
        await settle(pilot, lambda: isinstance(app.screen, Confirm))
        assert "max_steps" in app.screen.detail and app.is_running
        await pilot.press(answer)
        if answer == "n":
            await settle(pilot, lambda: not isinstance(app.screen, Confirm))
            assert app.is_running
        else:
            await settle(pilot, lambda: app.return_code == 0)


def press(app, *keys: str) -> None:
    """Keys that arrive in one packet: none waits for what the one before it does."""
    for key in keys:
        app.post_message(Key(key, key if len(key) == 1 else None))


async def test_keys_that_arrive_together_keep_their_order(root):
    app = panel(root)
    async with app.run_test(size=(120, 36)) as pilot:
        await go(app, pilot, "train")
        for number in range(10, 20):
            app.screen.query_one("#field-max_steps", Field).focus()
            await settle(pilot, lambda: app.focused is app.screen.query_one("#field-max_steps", Field))
            press(app, "enter", "end", "ctrl+u", *str(number), "enter")
            await settle(pilot, lambda n=number: app.screen.settings.edited == {"max_steps": str(n)})


async def test_several_fields_are_filled_by_one_packet(root):
    app = panel(root)
    async with app.run_test(size=(120, 36)) as pilot:
        await go(app, pilot, "train")
        app.screen.query_one("#field-lora_r", Field).focus()
        await settle(pilot, lambda: app.focused is app.screen.query_one("#field-lora_r", Field))
        press(app, "enter", "8", "enter", "down", "enter", "2", "4", "enter", "down", "down")
        await settle(pilot, lambda: app.screen.settings.edited == {"lora_r": "8", "lora_alpha": "24"})


async def test_a_paste_and_enter_in_one_packet(root):
    app = panel(root)
    async with app.run_test(size=(120, 36)) as pilot:
        await go(app, pilot, "train")
        press(app, "enter")
        app.post_message(Paste("a name\x1b[2J\nsecond line"))
        press(app, "enter")
        await settle(pilot, lambda: app.screen.settings.edited == {"run_name": "a name\\x1b[2J"})
