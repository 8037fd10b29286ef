"""Boxes in both forms, and what they say about the labels of samples."""

import json
import os

import pytest

from surgvqa.cli.main import main
from surgvqa.data.boxes import COLUMNS, Boxes, Centre
from surgvqa.data.samples import Sample
from surgvqa.data.visibility import CONTRADICTED, MOTION, NOT_SHOWN, POSITION, SUPPORTED, summary, visibility
from surgvqa.errors import UsageError

XML = """<annotation>
  <folder>{video}_frames</folder><filename>{video}_{number}.jpg</filename>
  <size><width>1240</width><height>1080</height><depth>3</depth></size>
  {objects}
</annotation>"""
OBJECT = """<object><name>lesion</name><unique_id>{name}</unique_id><box_id>1</box_id>
  <bndbox><xmin>{xmin}</xmin><xmax>{xmax}</xmax><ymin>{ymin}</ymin><ymax>{ymax}</ymax></bndbox></object>"""


def annotated(folder, number: int, x: float | None, y: float = 0.5, video: str = "002-001", name: str = "1"):
    """A frame with a lesion of 100x80 pixels at shares (x, y) of it, or without."""
    px, py = (x or 0) * 1240, y * 1080
    box = OBJECT.format(name=name, xmin=px - 50, xmax=px + 50, ymin=py - 40, ymax=py + 40) if x is not None else ""
    (folder / f"{video}_annotations").mkdir(parents=True, exist_ok=True)
    file = folder / f"{video}_annotations" / f"{video}_{number}.xml"
    file.write_text(XML.format(video=video, number=number, objects=box))
    return file


def sample(label: str, kind: str = MOTION, numbers=range(0, 8)) -> Sample:
    frames = tuple(f"002-001_{n}" for n in numbers)
    return Sample("qa_1", "002-001", frames, "Which?", kind, f"It is {label}.", label, 1, "t.jsonl")


def judged(boxes: Boxes, *samples: Sample) -> list[str | None]:
    return [one.verdict if one else None for one in visibility(samples, boxes, 0.05)]


def test_a_motion_is_supported_contradicted_or_not_shown(tmp_path):
    for n in range(8):
        annotated(tmp_path, n, 0.3 + 0.02 * n, 0.5 + 0.004 * n)  # 14 % to the right, 2.8 % down
    boxes = Boxes(tmp_path)
    labels = ("right", "left", "down", "stable", "Right ", "sideways")
    assert judged(boxes, *map(sample, labels)) == [
        SUPPORTED, CONTRADICTED, CONTRADICTED, CONTRADICTED, SUPPORTED, None,
    ]  # fmt: skip
    slow = [sample(label, numbers=(0, 1, 2)) for label in ("right", "stable", "left")]
    assert judged(boxes, *slow) == [NOT_SHOWN, SUPPORTED, NOT_SHOWN]
    assert judged(boxes, sample("right", numbers=(0, 100)), sample("stable", numbers=(100, 101))) == [NOT_SHOWN] * 2
    assert judged(boxes, sample("yes", "scope_motion")) == [None]


def test_the_window_is_named_that_would_show_a_motion(tmp_path):
    for n in range(100):
        annotated(tmp_path, n, 0.2, 0.9 - 0.004 * n)  # upward, 2.8 % within eight frames
    (one,) = visibility([sample("up", numbers=range(40, 48))], Boxes(tmp_path), 0.05)
    assert one.verdict == NOT_SHOWN and one.window == (37, 50)
    assert "2.8 % up" in one.shows
    (none,) = visibility([sample("down", numbers=range(40, 48))], Boxes(tmp_path), 0.05)
    assert none.window is None


def test_a_quadrant_is_that_of_the_mean_and_both_at_the_middle(tmp_path):
    for n in range(8):
        annotated(tmp_path, n, 0.25, 0.49)
    labels = ("upper-left", "lower left", "upper-right", "Lower-Right", "left", "center")
    samples = [sample(label, POSITION) for label in labels]
    assert judged(Boxes(tmp_path), *samples) == [SUPPORTED, SUPPORTED, CONTRADICTED, CONTRADICTED, None, None]


def test_of_two_lesions_that_of_most_frames_counts(tmp_path):
    for n in range(8):
        file = annotated(tmp_path, n, 0.3 + 0.02 * n)
        if n < 3:
            other = OBJECT.format(name="other", xmin=900 - 200 * n, xmax=950 - 200 * n, ymin=10, ymax=20)
            file.write_text(file.read_text().replace("</annotation>", f"{other}</annotation>"))
    assert judged(Boxes(tmp_path), sample("right"), sample("left")) == [SUPPORTED, CONTRADICTED]


def test_both_forms_say_the_same(tmp_path):
    annotated(tmp_path / "xml", 1, 0.25, 0.75)
    annotated(tmp_path / "xml", 2, None)
    rows = ["002-001_1,1240,1080,1,260,360,770,850", "002-001_2,1240,1080,,,,,"]
    (tmp_path / "b.csv").write_text("\n".join([",".join(COLUMNS), *rows]), encoding="utf-8-sig")
    for boxes in (Boxes(tmp_path / "xml"), Boxes(tmp_path / "b.csv")):
        assert boxes.lesions("002-001_1") == {"1": Centre(0.25, 0.75)}
        assert boxes.lesions("002-001_2") == {} and boxes.lesions("002-001_3") is None


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("b.csv", "frame,width\n", "no column height, lesion, xmin"),
        ("b.csv", ",".join(COLUMNS) + "\nv_1,10,10,a,1,x,1,2\n", "b.csv:2: xmax is 'x', expected a number of pixels"),
        ("b.csv", ",".join(COLUMNS) + "\nv_1,10,10,a,5,1,1,2\n", "expected xmin <= xmax"),
        ("b.csv", ",".join(COLUMNS) + "\nv_1,0,10,a,1,1,1,2\n", "frame of 0x10"),
        ("v_1.xml", "<annotation>", "v_1.xml: not valid XML"),
        ("v_1.xml", "<!DOCTYPE a [<!ENTITY b 'c'>]><a>&b;</a>", "with a document type"),
        ("v_1.xml", "<a>" + " " * (1 << 17) + "</a>", "larger than 64 KiB"),
        ("v_1.xml", "<a><object><bndbox><xmin>nan</xmin></bndbox></object></a>", "object 1: width is None"),
    ],
)
def test_what_is_no_box_is_named(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=said.replace("(", r"\(")):
        Boxes(tmp_path / name if name.endswith("csv") else tmp_path).lesions("v_1")
    with pytest.raises(UsageError, match="expected a folder of XML files or a CSV file"):
        Boxes(tmp_path / "none")
    assert Boxes(tmp_path).lesions("../secret_1") is None
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(UsageError, match="no regular file"):  # and waits for nobody
        Boxes(tmp_path / "pipe.csv")


def test_the_commands_tell_of_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for n in range(8):
        annotated(tmp_path / "boxes", n, 0.3 + 0.02 * n)
    lines, answers = [], []
    for number, label in enumerate(("right", "left", "right")):
        one = sample(label)
        row = {"id": f"qa_{number}", "video_id": one.video_id, "frames": one.frames, "question": f"Which {number}?",
               "question_type": MOTION, "answer": one.answer, "short_answer": label}  # fmt: skip
        lines.append(json.dumps(row))
        answers.append(json.dumps({"question_id": row["id"], "video_id": one.video_id, "question": row["question"],
                                   "question_type": MOTION, "short_answer": label,
                                   "predicted_answer": "It moves right."}))  # fmt: skip
    (tmp_path / "e.jsonl").write_text("\n".join(lines))
    (tmp_path / "p.jsonl").write_text("\n".join(answers))
    assert main(["check-data", "e.jsonl", "--boxes", "boxes", "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)["visibility"]
    assert (seen["samples"], seen["supported"], seen["contradicted"], seen["not_shown"]) == (3, 2, 1, 0)
    assert [one["place"] for one in seen["list"]] == ["e.jsonl:2"] and "14.0 % right" in seen["list"][0]["shows"]
    assert main(["check-data", "e.jsonl", "--boxes", "boxes"]) == 0
    assert "e.jsonl:2: left, the lesion moves 14.0 % right" in capsys.readouterr().out
    scoring = ["evaluate", "--predictions", "p.jsonl", "--boxes", "boxes"]
    assert main([*scoring, "--eval_data_path", "e.jsonl", "--json"]) == 0
    groups = json.loads(capsys.readouterr().out)["visibility"]
    assert groups["supported"]["samples"] == 2 and groups["supported"]["label_accuracy"] == 1.0
    assert groups["contradicted"]["samples"] == 1 and groups["contradicted"]["label_accuracy"] == 0.0
    assert main(scoring) == 2 and "--eval_data_path" in capsys.readouterr().err


def test_a_summary_counts_by_type_and_lists_what_is_not_supported(tmp_path):
    for n in range(8):
        annotated(tmp_path, n, 0.3 + 0.02 * n)
    samples = [sample("left"), sample("lower-right", POSITION), sample("upper-left", POSITION), sample("x", "y")]
    found = summary(visibility(samples, Boxes(tmp_path), 0.05))
    assert [found[key] for key in ("samples", SUPPORTED, CONTRADICTED, NOT_SHOWN)] == [3, 1, 2, 0]
    assert found["by_type"] == {
        MOTION: {SUPPORTED: 0, CONTRADICTED: 1, NOT_SHOWN: 0},
        POSITION: {SUPPORTED: 1, CONTRADICTED: 1, NOT_SHOWN: 0},
    }
    assert [one["label"] for one in found["list"]] == ["left", "lower-right"]
