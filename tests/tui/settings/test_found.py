"""A folder without surgvqa.toml: what is found in it, and the first question."""

import json

from panels import panel, settle, text

from surgvqa.config.workspace import load_workspace
from tui.app import OPEN_DEMO
from tui.dialogs.first_run import FirstRun
from tui.settings.found import found_settings, toml_of


def fill(root):
    for path in ("stage1/config.json", "stage1/model.safetensors", "lora/adapter_config.json",
                 "data/frames/002-001/1.jpg", "data/audio [in]/q1.wav", ".hidden/adapter_config.json"):  # fmt: skip
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text("{}")
    for name in ("train.jsonl", "eval.jsonl"):
        (root / "data" / name).write_text(json.dumps({"question": "q", "frames": ["f"]}) + "\n")
    (root / "data" / "other.jsonl").write_text("[1]\n")


def test_the_parts_of_a_workspace_are_found(tmp_path):
    assert found_settings(tmp_path) == {}
    fill(tmp_path)
    assert found_settings(tmp_path) == {
        "": {"audio_dir": "data/audio [in]", "frames_dir": "data/frames"},
        "merge": {"stage2_adapter_path": "lora", "stage1_model_path": "stage1"},
        "train": {"eval_data_path": "data/eval.jsonl", "train_data_path": "data/train.jsonl"},
    }
    (tmp_path / "surgvqa.toml").write_text(toml_of(found_settings(tmp_path)))
    assert load_workspace(tmp_path).value("stage1_model_path", "merge") == str(tmp_path / "stage1")


async def test_the_first_question_makes_the_file(tmp_path):
    fill(tmp_path)
    app = panel(tmp_path)
    async with app.run_test(size=(120, 36)) as pilot:
        await settle(pilot, lambda: isinstance(app.screen, FirstRun) and app.focused is not None)
        await pilot.press("enter")
        await settle(pilot, lambda: (tmp_path / "surgvqa.toml").is_file() and not isinstance(app.screen, FirstRun))
        await settle(pilot, lambda: "stage1" in str(app.screen.query_one("#field-stage1_model_path").text))


async def test_the_first_question_offers_the_demo(tmp_path):
    app = panel(tmp_path)
    async with app.run_test() as pilot:
        await settle(pilot, lambda: isinstance(app.screen, FirstRun) and app.focused is not None)
        await pilot.press("enter")
        await settle(pilot, lambda: app.return_code == OPEN_DEMO)


async def test_the_first_question_may_wait(tmp_path):
    app = panel(tmp_path)
    async with app.run_test(size=(120, 36)) as pilot:
        await settle(pilot, lambda: isinstance(app.screen, FirstRun) and app.focused is not None)
        await pilot.press("escape")
        await settle(pilot, lambda: "Choose the Stage-1 checkpoint" in text(app, "#merge-text"))
        assert not (tmp_path / "surgvqa.toml").exists()
