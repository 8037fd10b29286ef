"""The Ask screen over a stand-in for the process that holds the model, and the frames in half-blocks."""

import json
import sys

import pytest
from panels import go, panel, settle, text

Image = pytest.importorskip("PIL.Image")

from tui.content import frames  # noqa: E402
from tui.targets import asker  # noqa: E402

STAND_IN = """
import json, sys
if "broken" in sys.argv[-1]:
    sys.exit("surgvqa ask: broken: no such folder")
print(json.dumps({"ready": True, "model": "a model"}), flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if request["question"] == "Fails?":
        print(json.dumps({"error": "no sound [/x] in it"}), flush=True)
        continue
    assert len(request["frames"]) == 2 and request["audio"].endswith(".wav")
    share = {label: 0.9 if label == "red" else 0.1 for label in request["labels"]}
    print(json.dumps({"answer": "The colour is red.", "seconds": 0.25, "probabilities": share}), flush=True)
"""


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    names = {"red": "What colour [b]is it?", "blue": "Fails?"}
    rows = []
    (tmp_path / "frames" / "v").mkdir(parents=True)
    (tmp_path / "audio").mkdir()
    for number, (label, question) in enumerate(names.items()):
        shown = [f"v_{10 * number}", f"v_{10 * number + 1}"]
        for frame in shown:
            Image.new("RGB", (40, 20), label).save(tmp_path / "frames" / "v" / f"{frame}.png")
        (tmp_path / "audio" / f"q{number}.wav").touch()
        rows.append({"id": f"q{number}", "video_id": "v", "frames": shown, "question": question, "short_answer": label,
                     "question_type": "colour", "answer": f"The colour is {label}."})  # fmt: skip
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "surgvqa.toml").write_text(
        'eval_data_path = "eval.jsonl"\nframes_dir = "frames"\naudio_dir = "audio"\n[train]\nmodel_name_or_path = "m"\n'
    )
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(asker, "PROGRAM", (sys.executable, str(script)))
    return tmp_path


async def test_a_sample_is_seen_and_asked_and_the_model_stays_loaded(workspace):
    app = panel(workspace)
    async with app.run_test(size=(120, 36)) as pilot:
        await go(app, pilot, "ask")
        await settle(pilot, lambda: "▀" in text(app, "#clip") and "What colour [b]is it?" in text(app, "#ask-answer"))
        await pilot.press("enter")
        await settle(pilot, lambda: "The colour is red." in text(app, "#ask-answer"))
        shown = text(app, "#ask-answer")
        assert "0.25 s" in shown and "90.0 %  label" in shown and "blue" in shown and "10.0 %" in shown
        process = app.screen.asker
        await pilot.press("down")
        await settle(pilot, lambda: "Fails?" in text(app, "#ask-answer"))
        await pilot.press("a")
        await settle(pilot, lambda: "no sound [/x] in it" in text(app, "#notice"))
        assert app.screen.asker is process and process.alive
        await pilot.press("x")
        assert app.screen.asker is None
        await settle(pilot, lambda: not process.alive)


async def test_a_model_that_cannot_be_loaded_says_why(workspace):
    (workspace / "surgvqa.toml").write_text((workspace / "surgvqa.toml").read_text().replace('"m"', '"broken"'))
    app = panel(workspace)
    async with app.run_test(size=(80, 24)) as pilot:
        await go(app, pilot, "ask")
        await settle(pilot, lambda: app.screen.chosen is not None)
        await pilot.press("a")
        await settle(pilot, lambda: "broken: no such folder" in text(app, "#notice"))


async def test_without_samples_it_says_what_is_missing(root):
    app = panel(root)
    async with app.run_test(size=(80, 24)) as pilot:
        await go(app, pilot, "ask")
        await settle(pilot, lambda: "No samples" in text(app, "#ask-answer"))


def test_frames_stand_side_by_side_as_many_as_fit():
    images = [Image.new("RGB", (40, 20), colour) for colour in ("red", "lime", "blue", "white")]
    wide, narrow = (frames.strip(images, width) for width in (67, 33))
    assert [len(line) for line in wide.plain.split("\n")] == [67] * 4
    assert [len(line) for line in narrow.plain.split("\n")] == [33] * 4
    styles = [str(span.style) for span in wide.spans]
    assert "#ff0000 on #ff0000" in styles and "#ffffff on #ffffff" in styles
    assert frames.strip([], 40).plain == "no frames to show"
