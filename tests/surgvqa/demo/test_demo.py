"""The demo workspace: labels that are true, formats that are the real ones, a folder that is never somebody else's."""

from __future__ import annotations

import json
import math
import time
from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st
from places import REAL_DATA

np = pytest.importorskip("numpy")
pytest.importorskip("espeakng_loader")

from presets import step_down_presets  # noqa: E402
from surgvqa.cli.main import main  # noqa: E402
from surgvqa.config import resolve  # noqa: E402
from surgvqa.config.workspace import load_workspace  # noqa: E402
from surgvqa.data.boxes import Boxes  # noqa: E402
from surgvqa.data.samples import Sample  # noqa: E402
from surgvqa.data.visibility import MOTION, SUPPORTED, visibility  # noqa: E402
from surgvqa.demo import workspace  # noqa: E402
from surgvqa.demo.questions import QUESTION_TYPES  # noqa: E402
from surgvqa.demo.shots import CLIP_FRAMES, Shot, clips_of, draw_shots  # noqa: E402
from surgvqa.errors import UsageError  # noqa: E402

SIZES = (1240, 1080)


# --- shots, questions, samples ---------------------------------------------------------------------------------------


def rows_of(split: workspace.Split, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng(seed)
    return workspace.draw_samples(rng, split, clips_of(draw_shots(rng, split.video_id, split.groups)), 1)


@pytest.mark.parametrize("split", workspace.SPLITS, ids=lambda split: split.file)
def test_labels_are_balanced_and_no_sample_is_asked_twice(split):
    rows = rows_of(split)
    by_type = defaultdict(Counter)
    for row in rows:
        by_type[row["question_type"]][row["short_answer"]] += 1
    assert len(by_type) == len(QUESTION_TYPES) >= 8
    for labels in by_type.values():
        assert len(labels) >= 2 and len(set(labels.values())) == 1
    assert len({(row["question_type"], row["frames"][0]) for row in rows}) == len(rows)
    assert len({row["id"] for row in rows}) == len(rows)


def test_the_answer_contains_its_label_and_no_rival():
    for question_type in QUESTION_TYPES:
        for label, answer in question_type.answers.items():
            said = {other for other in question_type.answers if other.lower() in answer.lower()}
            assert said == {label}, (question_type.name, answer)


def test_consecutive_clips_share_frames_and_stay_in_one_shot():
    clips = clips_of([Shot("101-001", 0, "tunnel"), Shot("101-001", 1, "fluid")])
    assert len(set(clips[0].frames) & set(clips[1].frames)) == CLIP_FRAMES // 2
    assert not set(clips[0].frames) & set(clips[-1].frames)
    shots = draw_shots(np.random.default_rng(0), "101-001", 3)
    names = [shot.frame_name(i) for shot in shots for i in range(shot.length)]
    assert len(set(names)) == len(names)


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="../shared/data is not here")
def test_lines_have_the_real_files_keys_in_their_order_and_their_wordings():
    real = [
        json.loads(line) for f in ("in", "out") for line in (REAL_DATA / f"{f}_002-001.jsonl").open(encoding="utf-8")
    ]
    ours = rows_of(workspace.SPLITS[0])[0]
    assert list(ours) == list(real[0])
    assert [type(v) for v in ours.values()] == [type(v) for v in real[0].values()]
    known = {q.name: q for q in QUESTION_TYPES}
    for row in real:
        if (q := known.get(row["question_type"])) is not None:
            assert row["question"] in (*q.in_template, q.out_of_template)
            assert q.answers[row["short_answer"]] == row["answer"]


# --- pictures, speech, files -----------------------------------------------------------------------------------------


def test_pictures_show_what_the_shot_says():
    from surgvqa.demo.paint import Painter

    def middle(shot: Shot, i: int = 0) -> np.ndarray:
        picture = Painter(shot, 0).frame(i)
        assert picture.size == SIZES
        return np.asarray(picture, np.float32)[200:880, 300:940]

    white, narrow_band = (middle(Shot("v", 1, "tunnel", lighting=light)) for light in ("WL", "NBI"))
    assert white[..., 0].mean() > 1.3 * white[..., 1].mean()  # red
    assert narrow_band[..., 1].mean() > 1.3 * narrow_band[..., 0].mean()  # green
    dyed = middle(Shot("v", 1, "tunnel", dye=True))
    assert dyed[..., 2].mean() > 1.15 * white[..., 2].mean()
    assert np.abs(middle(Shot("v", 1, "tunnel"), 11) - white).mean() < 4  # still: nothing but grain
    assert np.abs(middle(Shot("v", 1, "tunnel", travel="advancing"), 11) - white).mean() > 10


@pytest.mark.parametrize(
    ("lesion", "axis", "sign"), [("left", 0, -1), ("right", 0, 1), ("up", 1, -1), ("down", 1, 1), ("stable", 0, 0)]
)
def test_the_lesion_moves_as_labelled(lesion, axis, sign):
    from surgvqa.demo.paint import DRIFT_LENGTH, Painter

    path = np.array(Painter(Shot("v", 3, "tunnel", lesion=lesion), 0).lesion)
    moved = path[-1] - path[0]
    assert moved[axis] == pytest.approx(DRIFT_LENGTH * sign) and moved[1 - axis] == pytest.approx(0)


def test_the_boxes_support_every_label_and_none_that_is_planted(tmp_path):
    from surgvqa.demo.paint import HEIGHT, WIDTH, Painter

    split = workspace.SPLITS[1]
    clips = clips_of(draw_shots(np.random.default_rng(0), split.video_id, split.groups))
    rows, samples = [], []
    for shot in {clip.shot.number: clip.shot for clip in clips if clip.shot.lesion}.values():
        painter = Painter(shot, 0)
        rows += [(shot.frame_name(i), WIDTH, HEIGHT, "a", *(painter.lesion_box(i) or ("",) * 4))
                 for i in range(shot.length)]  # fmt: skip
    workspace.write_boxes(tmp_path / "boxes.csv", rows)
    boxes, labels = Boxes(tmp_path / "boxes.csv"), ("left", "right", "up", "down", "stable")
    for clip in clips:
        for label in labels if clip.shot.lesion else ():
            told = "q", clip.shot.video_id, tuple(clip.frames), "?", MOTION, clip.shot.lesion, label
            samples.append(Sample(*told))
    found = visibility(samples, boxes, 0.05)
    assert len(samples) >= 5 * len(labels)
    assert [one.verdict == SUPPORTED for one in found] == [s.answer == s.short_answer for s in samples]


@pytest.mark.parametrize(("there", "back"), [("left", "right"), ("up", "down"), ("advancing", "withdrawing")])
def test_twins_are_the_same_film_run_backwards(there, back):
    """Nothing but the order of its frames may tell which way a clip moves."""
    from surgvqa.demo.paint import Painter

    kind = "travel" if there == "advancing" else "lesion"
    first, second = (Shot("v", number, "tunnel", place=5, **{kind: way}) for number, way in enumerate((there, back)))
    for i in (0, 5, 11):
        here = np.asarray(Painter(first, 0).frame(i), np.float32)
        assert np.abs(here - np.asarray(Painter(second, 0).frame(11 - i), np.float32)).mean() < 4  # grain


def test_opposite_ways_are_filmed_at_the_same_places():
    def looks(shots: list[Shot], ways: tuple[str, ...]) -> list[list[tuple]]:
        return [sorted((s.place, s.lighting, str(s.tool), s.dye, s.flush) for s in shots if way in (s.lesion, s.travel))
                for way in ways]  # fmt: skip

    shots = draw_shots(np.random.default_rng(0), "101-001", 3)
    alone = draw_shots(np.random.default_rng(0), "101-001", 3, twins=False)
    assert len(shots) == len(alone) and len({shot.place for shot in alone}) == len(alone)
    for ways in (("left", "right"), ("up", "down"), ("advancing", "withdrawing")):
        one, other = looks(shots, ways)
        assert one == other and len(one) == 6


@pytest.mark.parametrize("way", ["left", "right", "up", "down"])
def test_a_lumen_that_leaves_the_screen_is_drawn(way):
    from surgvqa.demo.paint import Painter

    painter = Painter(Shot("v", 3, "tunnel", lesion=way), 0)
    painter.lumen[-1] = [1.3, -1.3] if way in ("right", "up") else [-1.3, 1.3]
    assert painter.frame(11).size == SIZES


def test_every_voice_speaks_the_same_each_time():
    """Some breathe as the clock says, in seconds: the demo's weights and figures hung on when it was made."""
    from surgvqa.prepare.espeak import LANGUAGES, VARIANTS, Synthesiser, Voice

    def spoken() -> dict[str, bytes]:
        with Synthesiser() as espeak:
            voices = [Voice(f"{language}+{name}", 210, 50, 50) for language in LANGUAGES for name in VARIANTS]
            return {v.name: espeak.speak("Does the scope lie outside?", v).tobytes() for v in voices}

    first = spoken()
    time.sleep(1.1)
    second = spoken()
    assert [name for name in first if first[name] != second[name]] == []


def test_every_question_fits_into_the_audio_window():
    from surgvqa.demo.weights import DemoSizes
    from surgvqa.prepare.espeak import Synthesiser, draw_voice

    rng = np.random.default_rng(1)
    window = DemoSizes().audio_positions / 50
    longest = max((w for q in QUESTION_TYPES for w in (*q.in_template, q.out_of_template)), key=len)
    with Synthesiser() as espeak:
        waves = [espeak.speak(longest, draw_voice(rng)) for _ in range(20)]
        assert espeak.sample_rate == 22050
        _, words = espeak.speak_words("blue dye", draw_voice(rng))
    assert all(0.1 < np.abs(wave).max() <= 1 and len(wave) / 22050 < window for wave in waves)
    assert len({len(wave) for wave in waves}) > 10, "the voices should differ"
    assert [place for place, _ in words] == [0, 5] and words[0][1] < words[1][1]


@given(st.floats(-(2.0**100), 2.0**100, width=32))
def test_bfloat16_is_rounded_to_nearest_even(value):
    from surgvqa.demo.weights import bfloat16_bits

    bits = int(bfloat16_bits(np.array([value]))[0])
    near = [np.array([b << 16], np.uint32).view(np.float32)[0] for b in (max(bits - 1, 0), bits, bits + 1)]
    errors = [abs(float(n) - value) for n in near]
    assert errors[1] <= min(e for e in errors if not math.isnan(e))


def test_checkpoint_is_whole_bf16_and_of_the_known_architecture(tmp_path):
    from surgvqa.checkpoint.audit import audit
    from surgvqa.checkpoint.folder import open_checkpoint
    from surgvqa.demo.tokenizer import write_tokenizer
    from surgvqa.demo.weights import DemoSizes, write_stage1

    ids = write_tokenizer(tmp_path, workspace.training_text())
    write_stage1(tmp_path, DemoSizes(), ids, 0)
    report = audit(open_checkpoint(tmp_path))
    assert report["ok"], report["problems"]
    assert set(report["dtypes"]) == {"BF16"}
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert sorted(ids.values()) == list(range(min(ids.values()), min(ids.values()) + len(ids)))


# --- the folder ------------------------------------------------------------------------------------------------------


def test_a_foreign_folder_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert main(["demo", str(tmp_path)]) == 2
    assert "not made by surgvqa demo" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_another_seed_does_not_overwrite(tmp_path):
    (tmp_path / workspace.MANIFEST).write_text(
        json.dumps({"made_by": "surgvqa demo", "version": workspace.VERSION, "seed": 0})
    )
    workspace.require_ours(tmp_path, 0)
    with pytest.raises(UsageError, match="seed 0"):
        workspace.require_ours(tmp_path, 1)


def test_settings_and_presets_are_valid_and_a_run_steps_down_through_the_presets(tmp_path):
    workspace._write_settings(tmp_path)
    loaded = load_workspace(tmp_path)
    train = resolve.resolve("train", {}, loaded)
    assert train.preset == "demo-8f-112px" and train.options.image_size == workspace.IMAGE_SIZE
    assert [p.name for p in step_down_presets(tmp_path)] == list(workspace.PRESETS)
    resolve.resolve("merge", {}, loaded)


@pytest.fixture
def small(monkeypatch):
    """A demo of 25 + 25 shots and a few samples."""
    splits = [workspace.Split(s.file, s.video_id, s.wording, 1, 4) for s in workspace.SPLITS]
    monkeypatch.setattr(workspace, "SPLITS", tuple(splits))
    monkeypatch.setattr(workspace, "WORD_LISTS", 20)


@pytest.mark.model
def test_workspace_is_made_whole_reused_and_mended(tmp_path, small):
    from surgvqa.data.lookup import AudioIndex, FrameIndex
    from surgvqa.data.processors import load_processors
    from surgvqa.data.samples import read_samples

    folder = tmp_path / "demo"
    made = workspace.make_workspace(folder, 0)
    assert not made.reused
    for split in workspace.SPLITS:
        samples = read_samples(folder / split.file)
        frames, audio = FrameIndex(folder / "frames"), AudioIndex(folder / "audio", samples)
        for sample in samples:
            assert all(frames.find(frame).is_file() for frame in sample.frames)
            assert audio.find(sample).parent.name == f"{split.wording}_{split.video_id}"
    assert load_processors(folder / "stage1").num_audio_tokens == 160
    first = {p: p.read_bytes() for p in folder.rglob("*.safetensors")}

    assert workspace.make_workspace(folder, 0).reused
    frame = next((folder / "frames").rglob("*.jpg"))
    content = frame.read_bytes()
    frame.write_bytes(content[:100])
    assert not workspace.make_workspace(folder, 0).reused
    assert frame.read_bytes() == content
    assert first == {p: p.read_bytes() for p in folder.rglob("*.safetensors")}, "the same seed, other weights"
