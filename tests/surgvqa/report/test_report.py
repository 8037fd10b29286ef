"""`surgvqa report`: what is joined with what, what the page holds, and that nothing from outside is markup in it."""

import base64
import io
import json
from html.parser import HTMLParser

import pytest
from chromium import chromium_page

from surgvqa.cli.main import main
from surgvqa.data.samples import read_samples
from surgvqa.evaluation.interval import paired_interval
from surgvqa.report.collect import find_clusters, join, read_inputs
from surgvqa.report.page import metrics, types

Image = pytest.importorskip("PIL.Image")

EVIL = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">\u2028&lt;b&gt;"
WAV = b"RIFF\x2c\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0\x40\x1f\0\0\x80\x3e\0\0\2\0\x10\0data\x08\0\0\0" + bytes(8)


def sample(video, id, question, label="yes", first=100, frames=4):
    return {
        "id": id,
        "video_id": video,
        "frames": [f"{video}_{first + n}" for n in range(frames)],
        "question": question,
        "question_type": "moving",
        "answer": f"Reference: {label}.",
        "short_answer": label,
    }


def prediction(row, said, **more):
    return {
        "question_id": row["id"],
        "video_id": row["video_id"],
        "question_type": row["question_type"],
        "question": row["question"],
        "ground_truth": row["answer"],
        "short_answer": row["short_answer"],
        "predicted_answer": said,
        **more,
    }


def write_lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """Three samples, two of one id; frames and recordings; two models."""
    rows = [
        sample("v1", "q1", "Is the scope moving?"),
        sample("v2", "q1", "Is the view clear?", "no", first=200),
        sample("v1", "q2", EVIL, "no", first=300),
    ]
    for number, row in enumerate(rows):
        frames, audio = (tmp_path / kind / row["video_id"] for kind in ("frames", "audio"))
        frames.mkdir(parents=True, exist_ok=True)
        audio.mkdir(parents=True, exist_ok=True)
        for n, name in enumerate(row["frames"]):
            Image.new("RGB", (124, 108), (60 * number, 60 * n, 120)).save(frames / f"{name}.jpg")
        (audio / f"{row['id']}.wav").write_bytes(WAV[:-1] + bytes([number]))
    write_lines(tmp_path / "eval.jsonl", rows)
    write_lines(tmp_path / "one.jsonl", [prediction(row, "Yes.", inference_time_ms=12.4) for row in rows])
    write_lines(tmp_path / "two.jsonl", [prediction(row, EVIL if row["id"] == "q2" else "no") for row in rows])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def report(*words):
    return main(["report", *words, "--frames_dir", "frames", "--audio_dir", "audio"])


class Reader(HTMLParser):
    """The page's elements, its text, and the content of each script by its id."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.scripts, self.text, self._open = [], {}, [], None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._open = dict(attrs).get("id", "code") if tag == "script" else None
        if self._open:
            self.scripts[self._open] = ""

    def handle_endtag(self, tag):
        self._open = None

    def handle_data(self, data):
        if self._open:
            self.scripts[self._open] += data
        else:
            self.text.append(data)

    @property
    def samples(self):
        return json.loads(self.scripts["data"])["samples"]


def read_page(file):
    return Reader(file.read_text(encoding="utf-8"))


# --- what is joined with what -----------------------------------------------------------------------------------------


def test_answers_go_to_the_sample_of_their_video_and_id(workspace):
    assert report("one.jsonl", "two.jsonl", "eval.jsonl") == 0
    samples = read_page(workspace / "report.html").samples
    assert [(s["video"], s["id"]) for s in samples] == [("v1", "q1"), ("v2", "q1"), ("v1", "q2")]
    assert [s["question"] for s in samples[:2]] == ["Is the scope moving?", "Is the view clear?"]
    assert [s["frames"][0] for s in samples] == ["v1_100", "v2_200", "v1_300"]
    assert [s["answers"][1]["text"] for s in samples] == ["no", "no", EVIL]
    assert [s["answers"][0]["marks"]["label"] for s in samples] == [True, False, False]
    assert samples[0]["answers"][0]["ms"] == 12


def test_one_id_and_one_wording_in_two_videos_are_two_samples(workspace):
    rows = [sample("v1", "q1", "Is the scope moving?"), sample("v2", "q1", "Is the scope moving?", "no")]
    write_lines(workspace / "same.jsonl", rows)
    write_lines(workspace / "said.jsonl", [prediction(row, row["video_id"]) for row in reversed(rows)])
    inputs = read_inputs(["said.jsonl", "same.jsonl"], None)
    entries, notes = join(inputs.samples, inputs.models)
    assert [(entry.video, entry.answers[0].text) for entry in entries] == [("v1", "v1"), ("v2", "v2")]
    assert notes == []


def test_without_a_video_the_wording_decides_and_an_id_of_two_samples_never_does(workspace):
    inputs = read_inputs(["one.jsonl", "eval.jsonl"], None)
    for row in inputs.models[0].predictions:
        del row["video_id"]
    inputs.models[0].predictions[2]["question"] = ""  # q2 stands for one sample only
    entries, notes = join(inputs.samples, inputs.models)
    assert [bool(entry.answers[0]) for entry in entries] == [True, True, True]
    assert notes == []
    for row in inputs.models[0].predictions:
        row["question"] = ""
    entries, notes = join(inputs.samples, inputs.models)
    assert [bool(entry.answers[0]) for entry in entries[:3]] == [False, False, True]
    assert all(entry.sample is None for entry in entries[3:])
    assert "match no sample, or several" in notes[0]


def test_another_wording_is_another_question(workspace):
    write_lines(workspace / "out.jsonl", [prediction(sample("v1", "q1", "Does the scope move?"), "Yes.")])
    inputs = read_inputs(["out.jsonl", "eval.jsonl"], None)
    entries, notes = join(inputs.samples, inputs.models)
    assert len(entries) == 4
    assert entries[0].answers == [None]
    assert entries[3].question == "Does the scope move?"
    assert notes == ["out: 1 of 1 predictions match no sample, or several"]


def test_a_prediction_given_twice_counts_once_and_is_said(workspace):
    row = sample("v1", "q1", "Is the scope moving?")
    write_lines(workspace / "twice.jsonl", [prediction(row, "first"), prediction(row, "second")])
    inputs = read_inputs(["twice.jsonl", "eval.jsonl"], None)
    entries, notes = join(inputs.samples, inputs.models)
    assert entries[0].answers[0].text == "first"
    assert notes == ["twice: 1 predictions repeat an earlier one of the same sample; left out"]


def test_models_of_one_name_are_told_apart(workspace):
    for folder in ("a", "b"):
        (workspace / folder).mkdir()
        (workspace / folder / "one.jsonl").write_bytes((workspace / "one.jsonl").read_bytes())
    names = [model.name for model in read_inputs(["a/one.jsonl", "b/one.jsonl", "b/one.jsonl"], None).models]
    assert names == ["a/one", "b/one", "b/one (2)"]


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_holds_all_it_needs_and_asks_for_nothing(workspace):
    assert report("one.jsonl", "eval.jsonl") == 0
    page = read_page(workspace / "report.html")
    assert not [attrs for _, attrs in page.elements if {"src", "href", "srcset", "action"} & attrs.keys()]
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy and "http" not in policy
    row = page.samples[1]
    kind, _, content = page.scripts[row["strip"]].partition(";base64,")
    strip = Image.open(io.BytesIO(base64.b64decode(content)))
    assert kind == "image/webp" and strip.width == 4 * 320
    assert row["ratio"] == pytest.approx(124 / 108, abs=1e-3)
    middle = strip.convert("RGB").getpixel((3 * 320 + 160, strip.height // 2))
    assert middle == pytest.approx((60, 180, 120), abs=12)  # the fourth frame of the second sample
    kind, _, content = page.scripts[row["sound"]].partition(";base64,")
    assert kind == "audio/wav" and base64.b64decode(content) == WAV[:-1] + b"\1"


def test_text_from_outside_is_never_markup(workspace):
    rows = [json.loads(line) for line in (workspace / "eval.jsonl").read_text().splitlines()]
    rows[2] |= {"answer": EVIL, "short_answer": EVIL}
    write_lines(workspace / "evil.jsonl", rows)
    write_lines(workspace / "said.jsonl", [{**prediction(row, EVIL), "question_type": EVIL} for row in rows])
    assert report("said.jsonl", "evil.jsonl", "--title", EVIL) == 0
    page = read_page(workspace / "report.html")
    assert "img" not in {tag for tag, _ in page.elements}
    assert not [attrs for _, attrs in page.elements if any(name.startswith("on") for name in attrs)]
    assert sum(tag == "script" for tag, _ in page.elements) == len(page.scripts)
    assert page.samples[2]["answers"][0]["text"] == EVIL and page.samples[2]["label"] == EVIL
    assert EVIL in "".join(page.text)


def test_half_a_surrogate_pair_is_named_in_a_file_and_does_not_stop_the_page_in_a_title(workspace, capsys):
    line = json.dumps(prediction(sample("v1", "q1", "Is the scope moving?"), "x"))
    (workspace / "half.jsonl").write_text(line.replace('"x"', '"half \\ud800"') + "\n")
    assert report("half.jsonl", "eval.jsonl") == 2
    assert "half.jsonl:1: predicted_answer holds half of a surrogate pair" in capsys.readouterr().err
    assert report("eval.jsonl", "--title", "half \ud800") == 0
    assert "half " in "".join(read_page(workspace / "report.html").text)


def test_data_alone_is_a_viewer(workspace, capsys):
    assert report("eval.jsonl", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["samples"], said["models"]) == (3, [])
    page = read_page(workspace / "report.html")
    assert page.samples[0]["strip"] and page.samples[0]["answers"] == []
    assert "Scores" not in page.text


def test_predictions_alone_need_no_media(workspace):
    assert main(["report", "one.jsonl"]) == 0
    page = read_page(workspace / "report.html")
    assert len(page.samples) == 3 and "strip" not in page.samples[0]
    assert "keyword accuracy" in page.text


def test_models_of_the_same_samples_are_compared_and_their_intervals_clustered(workspace):
    """q1 and q2 of v1 lie 200 frame numbers apart: three clusters. Right: one 1 0 0, two 0 1 0."""
    assert report("one.jsonl", "two.jsonl", "eval.jsonl") == 0
    text = " ".join(" ".join(read_page(workspace / "report.html").text).split())
    assert "Compared with one" in text
    low, high = paired_interval([-1, 1, 0], [0, 1, 2])
    assert f"label +0.0 {100 * low:+.1f} to {100 * high:+.1f} 1 1 1" in text
    inputs = read_inputs(["one.jsonl"], None)
    assert find_clusters(inputs.models, read_samples("eval.jsonl")) == []
    (model,) = inputs.models
    assert model.scores["clusters"] == 3 and len(set(model.clusters)) == 3
    write_lines(workspace / "fewer.jsonl", [prediction(sample("v1", "q1", "Is the scope moving?"), "no")])
    assert report("one.jsonl", "fewer.jsonl", "eval.jsonl") == 0
    text = " ".join(read_page(workspace / "report.html").text)
    assert "Compared with" not in text and "fewer is not compared with one" in text


def test_a_run_brings_its_own_data(workspace):
    folder = workspace / "runs" / "20260101-000000-evaluate-abc"
    folder.mkdir(parents=True)
    (folder / "predictions.jsonl").write_bytes((workspace / "one.jsonl").read_bytes())
    options = {"eval_data_path": "eval.jsonl", "frames_dir": "frames", "audio_dir": "audio"}
    listed = {name: {"value": value, "from": "command line"} for name, value in options.items()}
    info = {"id": folder.name, "command": "evaluate", "started": 1.0, "options": listed}
    (folder / "run.json").write_text(json.dumps(info))
    (folder / "report.json").write_text(json.dumps({"keyword_interval": [0.1, 0.6], "clusters": 3}))
    assert main(["report", "last"]) == 0
    page = read_page(workspace / "report.html")
    assert page.samples[2]["frames"][0] == "v1_300"
    assert page.samples[2]["strip"] and page.samples[2]["sound"]
    assert "10.0 – 60.0" in page.text and "clusters" in page.text


def test_links_refer_to_files_and_embed_none(workspace):
    (workspace / "out").mkdir()
    assert report("one.jsonl", "eval.jsonl", "--link", "--output", "out/page.html") == 0
    page = read_page(workspace / "out" / "page.html")
    row = page.samples[0]
    assert set(page.scripts) == {"data", "code"} and "strip" not in row
    assert (workspace / "out" / row["urls"][0]).resolve() == workspace / "frames" / "v1" / "v1_100.jpg"
    assert (workspace / "out" / row["sound"]).resolve().is_file()


def test_what_is_missing_is_said_and_the_rest_shown(workspace):
    (workspace / "frames" / "v1" / "v1_101.jpg").unlink()
    (workspace / "frames" / "v2" / "v2_200.jpg").write_bytes(b"no picture")
    (workspace / "audio" / "v1" / "q2.wav").unlink()
    assert report("eval.jsonl") == 0
    page = read_page(workspace / "report.html")
    first, second, third = page.samples
    assert "v1_101 is missing" in first["notes"][0] and first["strip"]
    assert "v2_200 cannot be read" in second["notes"][0] and second["strip"]
    assert "no spoken question" in third["notes"][0] and "sound" not in third
    assert "3 samples have a missing" in "".join(page.text)


def test_thumbnails_shrink_until_the_page_fits_and_what_does_not_fit_is_said(workspace, capsys):
    def made(limit_bytes):
        assert report("eval.jsonl", "--max_mb", str(limit_bytes / 1e6), "--json") == 0
        said = json.loads(capsys.readouterr().out)
        assert said["bytes"] == (workspace / "report.html").stat().st_size
        return said

    whole = made(40e6)
    assert whole["frame_width"] == 320 and whole["notes"] == []
    smaller = made(whole["bytes"] + 1000)
    assert smaller["bytes"] < whole["bytes"] and smaller["notes"] == []
    assert 96 < smaller["frame_width"] < 320
    nothing = made(1000)
    assert [note.split(" MB")[0] for note in nothing["notes"]] == [
        "3 recordings did not fit into 0.001",
        "3 clips did not fit into 0.001",
    ]


def test_an_exif_orientation_is_applied(workspace):
    exif = Image.Exif()
    exif[274] = 6  # turned by a quarter
    for name in ("v1_100", "v1_101", "v1_102", "v1_103"):
        Image.new("RGB", (200, 100), "red").save(workspace / "frames" / "v1" / f"{name}.jpg", exif=exif)
    assert report("eval.jsonl") == 0
    assert read_page(workspace / "report.html").samples[0]["ratio"] == 0.5


def test_a_thumbnail_has_no_black_line_where_its_height_was_rounded(workspace):
    for name in ("v1_100", "v1_101", "v1_102", "v1_103"):
        Image.new("RGB", (200, 159), "white").save(workspace / "frames" / "v1" / f"{name}.jpg")
    assert report("eval.jsonl") == 0
    page = read_page(workspace / "report.html")
    strip = Image.open(io.BytesIO(base64.b64decode(page.scripts[page.samples[0]["strip"]].partition(",")[2])))
    assert strip.size == (4 * 320, 254)
    assert min(low for low, _ in strip.convert("RGB").getextrema()) > 200


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "nothing to show"),
        (["nowhere/p.jsonl"], "nowhere/p.jsonl: no such file"),
        (["norun"], "norun: no runs in"),
        (["broken.jsonl"], "broken.jsonl:1: not JSON"),
        (["eval.jsonl", "--output", "nowhere/page.html"], "folder that does not exist"),
        (["eval.jsonl", "--output", "one.jsonl"], "not a report of this program"),
        (["eval.jsonl", "--frames_dir", "nowhere"], "no such folder of frames"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(workspace, capsys, words, said):
    (workspace / "broken.jsonl").write_text("{half\n")
    before = sorted(workspace.iterdir())
    assert main(["report", *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("surgvqa report: ") and said in lines[0]
    assert sorted(workspace.iterdir()) == before


# --- scores, whatever keys there are ----------------------------------------------------------------------------------


def test_every_accuracy_is_drawn_with_its_interval_and_the_figure_to_beat(workspace):
    model = read_inputs(["one.jsonl"], None).models[0]
    model.scores |= {
        "word_accuracy": 0.4,
        "word_interval": [0.3, 0.5],
        "train_majority_accuracy": 0.6,
        "informative": {"types": 1, "samples": 3, "label_accuracy": 0.25, "majority_accuracy": 0.5},
    }
    drawn = metrics([model])
    assert drawn["word"][0].interval == (0.3, 0.5) and drawn["word"][0].majority == 0.6
    informative = drawn["informative types: label"][0]
    assert (informative.value, informative.majority, informative.interval) == (0.25, 0.5, None)
    assert not [name for name in drawn if "majority" in name]


def test_a_confusion_table_has_the_same_columns_in_each_row(workspace):
    model = read_inputs(["one.jsonl"], None).models[0]
    model.scores["by_type"]["moving"]["confusion"] = {"yes": {"no": 2}, "no": {"yes": 1, "maybe": 3}}
    table = types([model])["moving"][0]["confusion"]
    assert table == {"yes": {"no": 2, "yes": 0, "maybe": 0}, "no": {"no": 0, "yes": 1, "maybe": 3}}
    assert list(table["yes"]) == list(table["no"])


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_in_a_browser(workspace, tmp_path):
    """Keys, filters, sound, flip-book; no request, no complaint, nothing of the text is run."""
    assert report("one.jsonl", "two.jsonl", "eval.jsonl") == 0
    with chromium_page(tmp_path) as page:
        page.open((workspace / "report.html").as_uri())
        chosen = "document.querySelector('[aria-selected=true] .top').textContent"
        frame = "document.querySelector('.player .name').textContent"
        count = "document.getElementById('count').textContent"
        assert page.value("document.querySelectorAll('.row').length") == 3
        assert page.value(chosen).startswith("v1 · q1")
        page.until(f"{frame}.startsWith('2 of 4')")  # it plays by itself
        page.press("ArrowDown")
        page.press("ArrowRight")
        assert page.value(chosen).startswith("v2 · q1") and page.value(frame) == "2 of 4: v2_201"
        page.press("ArrowLeft")
        page.press("ArrowLeft")
        assert page.value(frame) == "4 of 4: v2_203"
        assert page.value("document.querySelector('.stage').style.backgroundPosition").startswith("100%")
        assert page.value(
            "new Promise(done => { const a = document.querySelector('audio'); a.onerror = () => done(false);"
            "a.onloadedmetadata = () => done(a.duration > 0); a.preload = 'auto'; a.load() })"
        )
        page.value(
            "const select = document.getElementById('right'); select.value = 'flipped';"
            "select.dispatchEvent(new Event('change'))"
        )
        assert page.value(count) == "2 of 3 samples"
        page.press("/")
        page.press("z")
        page.until(f"{count} === '0 of 3 samples'")
        for width in (1280, 400):
            page.size(width, 900)
            assert page.value("document.documentElement.scrollWidth") <= width
        assert page.value("document.title") == "one and two"
        assert not [address for address in page.requests if not address.startswith(("file:", "data:"))]
        assert page.complaints == []


def test_a_probe_has_a_picture_and_its_conclusions(workspace):
    run = workspace / "runs" / "20261127-010000-probe-abc"
    run.mkdir(parents=True)
    write_lines(
        run / "predictions.jsonl", json.loads(f"[{','.join((workspace / 'one.jsonl').read_text().splitlines())}]")
    )
    row = {"influence": 0.93, "influence_interval": [0.89, 0.97], "difference": -0.5}
    conditions = {"other_question": row, "silence": {"influence": "much"}, EVIL: {"influence": 0.1, "difference": 9}}
    (run / "report.json").write_text(json.dumps({"conditions": conditions, "conclusion": ["sound: follows", EVIL]}))
    assert report(str(run)) == 0
    page = Reader((workspace / "report.html").read_text())
    assert "sound: follows" in page.text and "a question of another type is spoken" in page.text
    assert "93.0 %" in page.text and "accuracy -50.0 points" in page.text and "silence" not in page.text
