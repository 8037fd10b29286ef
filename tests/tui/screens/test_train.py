"""The panel's Train screen, driven as by a user."""

import asyncio
import contextlib
import json

import pytest
from panels import SIZES, go, panel, settle, text, training
from textual.events import AppBlur, AppFocus, Key
from textual.widgets import Footer

from surgvqa.config import workspace
from surgvqa.errors import UsageError
from surgvqa.machine import gpu
from tui.dialogs.confirm import Confirm
from tui.screens.monitor import MonitorScreen
from tui.settings.settings import Settings, preset_changes
from tui.widgets.form import Editor, Field


async def test_letters_typed_into_a_field_are_not_keys(root):
    app = panel(root)
    async with app.run_test(size=(120, 36)) as pilot:
        await go(app, pilot, "train")
        await pilot.press("enter")  # the first field is run_name
        await settle(pilot, lambda: app.screen.query(Editor) and app.screen.query_one(Editor).has_focus)
        await pilot.press(*"q1lx4", "enter")
        await settle(pilot, lambda: app.screen.settings.edited and not app.screen.query(Editor))
        assert app.is_running and app.current_mode == "train"
        field = app.screen.query_one("#field-run_name", Field)
        assert field.text == "q1lx4" and field.origin == "edited here"
        assert "--run_name=q1lx4" in app.screen.settings.argv()
        await pilot.press("x")
        await settle(pilot, lambda: field.text == "")
        assert app.screen.settings.argv() == ["train"]


async def test_what_is_typed_faster_than_the_panel_draws_is_text(root):
    """Over a slow line keys come many at once: none of them may act on what had the focus before."""
    app = panel(root)
    async with app.run_test(size=(120, 36)) as pilot:
        await go(app, pilot, "train")
        for key in ("down", "enter", *"q1lx", "enter"):
            app.post_message(Key(key, key if len(key) == 1 else None))
        await settle(pilot, lambda: app.screen.settings.edited)
        assert app.is_running and app.screen.settings.edited == {"model_name_or_path": "q1lx"}


@pytest.mark.parametrize("key", ["down", "up", "shift+tab"])
async def test_moving_on_keeps_what_was_typed(root, key):
    """What a field shows is what is used: no editor stays open behind."""
    app = panel(root)
    async with app.run_test(size=(120, 36)) as pilot:
        await go(app, pilot, "train")
        await pilot.press("down", "enter", *"base")
        await pilot.press(key)
        await settle(pilot, lambda: app.screen.settings.edited == {"model_name_or_path": "base"})
        await settle(pilot, lambda: not app.screen.query(Editor))
        assert app.screen.query_one("#field-model_name_or_path", Field).has_focus == (key == "shift+tab")


async def test_another_window_in_front_leaves_the_editor_open(root):
    app = panel(root)
    async with app.run_test(size=(120, 36)) as pilot:
        await go(app, pilot, "train")
        await pilot.press("enter", *"hal")
        app.post_message(AppBlur())
        await settle(pilot, lambda: not app.app_focus)
        app.post_message(AppFocus())
        await settle(pilot, lambda: app.app_focus and app.screen.query_one(Editor).has_focus)
        await pilot.press(*"f", "enter")
        await settle(pilot, lambda: app.screen.settings.edited == {"run_name": "half"})


async def test_tab_completes_a_path(root):
    (root / "checkpoints" / "stage1").mkdir(parents=True)
    app = panel(root)
    async with app.run_test(size=(120, 36)) as pilot:
        await go(app, pilot, "train")
        await pilot.press("down", "enter", *"che")
        editor = app.screen.query_one(Editor)
        await settle(pilot, lambda: editor._suggestion == "checkpoints/")
        await pilot.press("tab")
        assert editor.value == "checkpoints/" and editor.has_focus
        assert any(active.binding.description == "complete" for active in app.screen.active_bindings.values())


async def test_a_bad_value_is_refused_in_place_and_stays_to_be_mended(root):
    app = panel(root)
    async with app.run_test(size=(120, 36)) as pilot:
        await go(app, pilot, "train")
        app.screen.query_one("#field-num_frames", Field).focus()
        await pilot.press("enter", "x", "enter")
        await settle(pilot, lambda: "whole number" in text(app, "#notice"))
        assert app.screen.settings.edited == {} and text(app, "#notice").count("num_frames") == 1
        await settle(pilot, lambda: app.screen.query(Editor))
        assert app.screen.query_one(Editor).value == "x"  # the text was selected: typing replaced it
        await pilot.press("backspace", "6", "enter")
        await settle(pilot, lambda: app.screen.settings.edited == {"num_frames": "6"})
        await settle(pilot, lambda: text(app, "#notice") == "")


@pytest.mark.parametrize("size", SIZES)
async def test_a_preset_is_shown_before_it_is_applied(root, size):
    app = panel(root)
    async with app.run_test(size=size) as pilot:
        await go(app, pilot, "train")
        await pilot.press("f9")
        await settle(pilot, lambda: "would change" in text(app, "#presets"))
        shown = text(app, "#presets")
        assert "would change" in shown and "8 → 6" in shown
        assert "stays 512" in shown and "surgvqa.toml" in shown  # pinned there
        assert app.session.preset == "baseline-8f-512px"
        await pilot.press("escape")
        await settle(pilot, lambda: "would change" not in text(app, "#presets"))
        assert app.session.preset == "baseline-8f-512px"
        await pilot.press("f9", "enter")
        await settle(pilot, lambda: "oom-6f-384px" in text(app, "#where"))
        assert app.session.preset == "oom-6f-384px"
        assert app.screen.query_one("#field-num_frames", Field).text == "6"


async def test_a_small_terminal_shows_all_that_a_preset_would_change(root):
    """Eight presets, of which one is looked at: what it changes and the key that applies it are on the screen."""
    (root / "presets").mkdir()
    for i in range(4):
        (root / "presets" / f"own{i}.toml").write_text(
            f'reason = "r"\ngives_up = "g"\n[settings]\nnum_frames = {i + 2}\n'
        )
    app = panel(root)
    async with app.run_test(size=(80, 24)) as pilot:
        await go(app, pilot, "train")
        await settle(pilot, lambda: len(text(app, "#presets").splitlines()) == 8)
        await pilot.press("f12")
        await settle(pilot, lambda: "would change" in text(app, "#presets"))
        shown, side = app.screen.query_one("#presets"), app.screen.query_one("#train-side")
        await settle(pilot, lambda: shown.region.bottom <= side.region.bottom)
        lines = text(app, "#presets").splitlines()
        assert "Enter applies" in lines[-1] and "F12" in "".join(lines) and "F6" not in "".join(lines)
        assert not app.screen.check_action("launch", ())
        await pilot.press("escape")
        await settle(pilot, lambda: "F6" in text(app, "#presets") and app.screen.check_action("launch", ()))
        footer = app.screen.query_one(Footer)
        assert max(key.region.right for key in footer.query("FooterKey")) <= 80


def test_preset_changes_name_what_holds_a_value(root):
    settings = Settings("train", workspace.load_workspace(root))
    settings.edit("num_frames", "8")
    changes = {c.name: c for c in preset_changes(settings, "baseline-8f-512px", "oom-6f-384px")}
    assert changes["num_frames"].pinned_by == "edited here" and changes["num_frames"].new == 6
    assert changes["image_size"].pinned_by == "surgvqa.toml"


def test_a_host_is_told_everything_that_is_shown(root):
    (root / "surgvqa.toml").write_text('frames_dir = "frames"\n[train]\nlearning_rate = 1.23456789e-5\n')
    settings = Settings("train", workspace.load_workspace(root))
    settings.edit("audio_dir", "audio")
    assert settings.argv("baseline-8f-512px", everything=True)[:3] == ["train", "--preset", "baseline-8f-512px"]
    assert set(settings.argv(everything=True)[1:]) == {
        f"--frames_dir={root}/frames", f"--audio_dir={root}/audio", "--learning_rate=1.23456789e-05"
    }  # fmt: skip


async def test_the_predicted_peak_stands_against_the_budget(root):
    app = panel(root)
    async with app.run_test(size=(120, 36)) as pilot:
        await pilot.press("3")
        await settle(pilot, lambda: "predicted of 28.5 GB" in text(app, "#memory"))
        found = app.screen.predictions["baseline-8f-512px"]
        assert 15e9 < found.peak_bytes < 40e9  # the real model's sizes: no checkpoint is chosen here
        assert sum(p.bytes for p in found.parts) == pytest.approx(found.peak_bytes, rel=1e-6)
        rows = [row for row in text(app, "#presets").splitlines() if " GB" in row]
        assert len(rows) >= 4 and all("█" in row and "┃" in row for row in rows)  # each against the budget
        shown = " ".join(text(app, "#memory").split())
        assert ("this machine has none" in shown) == (not gpu.any_gpu())
        assert "spare for speed: 2" in shown and "of 28 layers recompute" in shown


async def test_a_budget_that_is_far_too_small_is_shown_as_exceeded(root):
    """A slip of the finger while the budget is typed."""
    app = panel(root)
    async with app.run_test(size=(120, 36)) as pilot:
        await pilot.press("3")
        await settle(pilot, lambda: "predicted of 28.5 GB" in text(app, "#memory"))
        app.screen.settings.edit("budget_gb", "0.1")
        app.screen.show_all()
        await settle(pilot, lambda: "over by" in text(app, "#memory"))
        assert text(app, "#notice") == ""


@pytest.mark.parametrize("size", SIZES)
async def test_the_prediction_is_as_wide_as_its_panel(root, size):
    app = panel(root)
    async with app.run_test(size=size) as pilot:
        await pilot.press("3")
        await settle(pilot, lambda: "predicted of 28.5 GB" in text(app, "#memory"))
        for id in ("#memory", "#presets"):
            await settle(pilot, lambda id=id: len(text(app, id).splitlines()[1]) == app.screen.query_one(id).size.width)


async def test_the_data_is_checked_beside_the_memory(root):
    """As soon as the screen is there, and again by its key when the file has changed."""
    sample = {"id": "q", "video_id": "v", "frames": ["v_1"], "question": "Is it?", "question_type": "t"}
    (root / "train.jsonl").write_text(json.dumps(sample | {"answer": "It is.", "short_answer": "yes"}) + "\n")
    (root / "surgvqa.toml").write_text('train_data_path = "train.jsonl"\n')
    app = panel(root)
    async with app.run_test(size=(120, 36)) as pilot:
        await go(app, pilot, "train")
        await settle(pilot, lambda: "✓ 1 samples" in text(app, "#data"))
        assert "not looked at: frames and audio" in text(app, "#data")
        memory, data = app.screen.query_one("#memory"), app.screen.query_one("#data")
        assert memory.display and data.display and memory.region.x == data.region.x
        (root / "train.jsonl").write_text("{")
        await pilot.press("d")
        await settle(pilot, lambda: "1 lines that are wrong" in text(app, "#data"))


async def test_launch_is_refused_with_the_checks_own_line(root):
    app = panel(root)
    async with app.run_test(size=(120, 36)) as pilot:
        await go(app, pilot, "train")
        await pilot.press("l")
        await settle(pilot, lambda: "model_name_or_path" in text(app, "#notice"), 60)
        assert app.current_mode == "train" and not (root / "runs").exists()


async def test_a_key_pressed_twice_starts_one_job(root, monkeypatch):
    """The input is checked for seconds, in which nothing seems to happen."""
    app = panel(root)
    checked, launched = asyncio.Event(), []

    async def launch(*argv, **_):
        launched.append(argv)
        await checked.wait()
        raise UsageError("no such folder")

    monkeypatch.setattr(app.session.here, "launch", launch)
    async with app.run_test(size=(120, 36)) as pilot:
        await go(app, pilot, "train")
        await pilot.press("l", "l")
        await settle(pilot, lambda: launched)
        await pilot.press("l")
        checked.set()
        await settle(pilot, lambda: "no such folder" in text(app, "#notice"))
        assert len(launched) == 1
        await pilot.press("l")
        await settle(pilot, lambda: len(launched) == 2)


@pytest.mark.parametrize("key", ["c", "e"])
async def test_a_second_job_on_the_gpu_asks_first(root, monkeypatch, key):
    ended = training(root, name="ended")
    with contextlib.suppress(UsageError), ended:
        ended.emit("checkpoint", step=30, path="checkpoints/checkpoint-30")
        if key == "c":
            raise UsageError("disk full")
    training(root, name="going")
    app = panel(root)
    launched = []

    async def launch(*argv, **_):
        launched.append(argv)
        return ended.id

    monkeypatch.setattr(app.session.here, "launch", launch)
    async with app.run_test(size=(120, 36)) as pilot:
        await settle(pilot, lambda: isinstance(app.screen, MonitorScreen))
        monitor = app.screen
        monitor.attach(ended.id)
        await settle(pilot, lambda: monitor.check_action({"c": "resume", "e": "evaluate"}[key], ()))
        await pilot.press(key)
        await settle(pilot, lambda: isinstance(app.screen, Confirm))
        assert "Both would share the memory" in app.screen.detail and not launched
        await pilot.press("y")
        await settle(pilot, lambda: launched)
