"""Reading JSONL, and finding frames and spoken questions: what is legal, and what each mistake is told."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from places import REAL_DATA

from surgvqa.data.lookup import AudioIndex, FrameIndex, MissingFile
from surgvqa.data.samples import Sample, majority_accuracy, read_samples, scan_samples
from surgvqa.errors import UsageError


def record(**changes) -> dict:
    """A good line, changed; a field set to ... is left out."""
    line = {
        "id": "qa_1",
        "video_id": "002-001",
        "frames": ["002-001_18743", "002-001_18747"],
        "frame_numbers": [18743, 18747],
        "question": "Is a tool visible?",
        "question_type": "tool_check",
        "answer": "No tool is visible.",
        "short_answer": "no",
    } | changes
    return {key: value for key, value in line.items() if value is not ...}


def write(path: Path, *lines) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="no shared/data")
@pytest.mark.parametrize("name", ["in_002-001.jsonl", "out_002-001.jsonl"])
def test_the_real_files_are_read(name):
    samples = read_samples(REAL_DATA / name)
    assert len(samples) == 50 and samples[0].frames[0] == "002-001_18743" and samples[49].line == 50
    assert all(len(sample.frames) == 8 for sample in samples)


def test_byte_order_mark_crlf_and_blank_end_are_tolerated(tmp_path):
    file = tmp_path / "windows.jsonl"
    lines = [json.dumps(record(id=f"qa_{i}", question="Größe?"), ensure_ascii=False) for i in range(2)]
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n\r\n  \n")
    samples = read_samples(file)
    assert [(s.id, s.line, s.question) for s in samples] == [("qa_0", 1, "Größe?"), ("qa_1", 2, "Größe?")]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{not json", "not JSON: Expecting property name enclosed in double quotes at column 2"),
        ("", "the line is blank, expected a JSON object"),
        ("[1]", "the line is a list, expected a JSON object"),
        ("null", "the line is null, expected a JSON object"),
        (record(question=...), "question is missing, expected text"),
        (record(answer="  "), "answer is empty, expected text"),
        (record(short_answer=3), "short_answer is a number, expected text"),
        (record(id="a/b"), "id is 'a/b', expected text that can be part of a file name"),
        (record(video_id=".."), "video_id is '..', expected text that can be part of a file name"),
        ('{"id": "\\ud800"}', "id holds half of a surrogate pair, expected text"),
        (record(frames=...), "frames is missing, expected a list of names 002-001_<frame number>"),
        (record(frames="002-001_1"), "frames is text, expected a list of names 002-001_<frame number>"),
        (record(frames=[]), "frames is an empty list, expected a list of names 002-001_<frame number>"),
        (record(frames=["002-001_1", 2]), "frames[1] is a number, expected a name 002-001_<frame number>"),
        (record(frames=["002-002_1"]), "frames[0] is '002-002_1', expected 002-001_<frame number>"),
        (record(frames=["002-001_../1"]), "frames[0] is '002-001_../1', expected 002-001_<frame number>"),
        ('{"id": "a", "id": "b"}', "id is given twice, expected each key once"),
        ('{"id": "a", "support": {"x": 1, "y": 2, "x": 1}}', "x is given twice, expected each key once"),
        (json.dumps(record(note=["\ud800"])), "note holds half of a surrogate pair, expected text"),
        ("[" * 100_000, "not valid JSON"),
        ('{"id": ' + "9" * 10_000 + "}", "not valid JSON"),
    ],
)
def test_a_bad_line_is_told_with_its_place(tmp_path, line, told):
    file = write(tmp_path / "train.jsonl", record(), line, record())
    samples, problems = scan_samples(file)
    assert [s.line for s in samples] == [1, 3]
    assert len(problems) == 1 and str(problems[0]).startswith(f"{file}:2: {told}")
    with pytest.raises(UsageError) as error:
        read_samples(file)
    assert str(error.value) == str(problems[0]) and "\n" not in str(error.value)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\x0c", "\x1c", "\x0b"])
def test_a_line_ends_at_a_newline_only(tmp_path, separator):
    question = f"A{separator}B?"
    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps(record(question=question), ensure_ascii=separator < " ") + "\n", encoding="utf-8")
    assert [s.question for s in read_samples(file)] == [question]


def test_utf_16_is_named(tmp_path):
    (tmp_path / "windows.jsonl").write_text(json.dumps(record()), encoding="utf-16")
    with pytest.raises(UsageError, match=r"windows\.jsonl: the text is UTF-16, expected UTF-8"):
        read_samples(tmp_path / "windows.jsonl")


def test_bytes_that_are_no_utf8(tmp_path):
    file = tmp_path / "latin.jsonl"
    file.write_bytes(json.dumps(record(question="Grösse?"), ensure_ascii=False).encode("latin-1"))
    with pytest.raises(UsageError, match=r"latin.jsonl:1: byte \d+ is not UTF-8"):
        read_samples(file)


def test_the_first_bad_line_is_named_and_the_rest_counted(tmp_path):
    file = write(tmp_path / "train.jsonl", "x", record(), "y", "z")
    with pytest.raises(UsageError, match=r"train.jsonl:1: not JSON.*\(and 2 more bad lines; surgvqa check-data lists"):
        read_samples(file)


def test_files_that_hold_no_samples(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n \n")
    for path, told in [("empty.jsonl", "empty, expected"), ("none.jsonl", "No such file"), (".", "Is a directory")]:
        with pytest.raises(UsageError, match=told):
            read_samples(tmp_path / path)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda x: st.lists(x) | st.dictionaries(st.text(), x),
)
LINES = st.one_of(
    st.binary(),
    JSON.map(lambda value: json.dumps(value).encode()),
    st.dictionaries(st.sampled_from(list(record())), JSON).map(lambda changes: json.dumps(record(**changes)).encode()),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no bug
@given(st.lists(LINES).map(b"\n".join))
def test_any_bytes_are_samples_or_one_clear_line(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "any.jsonl"
    file.write_bytes(content)
    try:
        samples = read_samples(file)
    except UsageError as error:
        assert str(error).encode().startswith(f"{file}:".encode()) and "\n" not in str(error)
    else:
        assert samples and all(isinstance(s, Sample) and s.frames and s.question.strip() for s in samples)


# --- frames -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["002-001_7.jpg", "7.jpg", "002-001_7.PNG", "7.jpeg"])
def test_a_frame_is_found_by_name_or_number(tmp_path, name):
    touch(tmp_path, f"002-001/{name}", "002-001/8.jpg", "002-001/7.txt")
    assert FrameIndex(tmp_path).find("002-001_7") == tmp_path / "002-001" / name


def test_a_missing_frame_names_what_was_tried(tmp_path):
    touch(tmp_path, "002-001/8.jpg")
    frames = FrameIndex(tmp_path)
    with pytest.raises(MissingFile, match=r"frame 002-001_7 is missing: no 002-001_7.jpg or 7.jpg .* in .*/002-001$"):
        frames.find("002-001_7")
    with pytest.raises(MissingFile, match=r"frame 003-001_7 is missing: no folder .*/003-001$"):
        frames.find("003-001_7")
    with pytest.raises(UsageError, match="no such folder of frames"):
        FrameIndex(tmp_path / "nowhere")


# --- spoken questions -------------------------------------------------------------------------------------------------


def sample(id="qa_1", video="002-001", question="A?", kind="t", file="train.jsonl", line=1) -> Sample:
    return Sample(id, video, (f"{video}_1",), question, kind, "a", "a", line, file)


def heard(root: Path, *samples: Sample) -> list[str]:
    index = AudioIndex(root, samples)
    return [str(index.find(s).relative_to(root)) for s in samples]


@pytest.mark.parametrize(
    "name",
    ["002-001/qa_1.mp3", "in_002-001/qa_1.wav", "out_002-001/qa_1.flac", "002-001_qa_1_t.ogg", "qa_1.m4a", "qa_1.MP3"],
)
def test_each_place_of_a_spoken_question(tmp_path, name):
    touch(tmp_path, name, "qa_1.txt", "qa_10.mp3", "003-001/qa_1.mp3")
    assert heard(tmp_path, sample()) == [name]


def test_the_old_scripts_folder_of_one_wording(tmp_path):
    root = touch(tmp_path / "in_002-001", "qa_1.mp3", "qa_2.mp3")
    samples = [sample(file="in_002-001.jsonl"), sample("qa_2", question="B?", file="in_002-001.jsonl")]
    assert heard(root, *samples) == ["qa_1.mp3", "qa_2.mp3"]


def test_a_missing_question_names_every_place(tmp_path):
    with pytest.raises(MissingFile) as error:
        AudioIndex(tmp_path, [sample()]).find(sample())
    for place in ("002-001/qa_1", "in_002-001/qa_1", "out_002-001/qa_1", "002-001_qa_1_t", "qa_1 (.mp3 .wav"):
        assert place in str(error.value)
    assert str(error.value).startswith("train.jsonl:1: ") and "\n" not in str(error.value)
    with pytest.raises(UsageError, match="no such folder of spoken questions"):
        AudioIndex(tmp_path / "nowhere", [])


def test_an_id_of_two_questions_is_never_heard_from_one_file(tmp_path):
    touch(tmp_path, "qa_1.mp3")
    samples = [sample(line=3), sample(video="002-002", question="B?", line=9)]
    with pytest.raises(UsageError) as error:
        heard(tmp_path, *samples)
    assert "stands for two questions" in str(error.value)
    for part in ("train.jsonl:3", "train.jsonl:9", "'A?'", "'B?'", "002-001", "002-002"):
        assert part in str(error.value)


def test_an_id_of_one_question_may_be_heard_from_one_file_in_any_video(tmp_path):
    touch(tmp_path, "qa_1.mp3")
    assert heard(tmp_path, sample(), sample(video="002-002", question=" a? ")) == ["qa_1.mp3"] * 2


def test_an_id_of_two_questions_in_one_video_needs_the_composite_name(tmp_path):
    touch(tmp_path, "002-001/qa_1.mp3")
    samples = [sample(), sample(question="B?", kind="u", line=2)]
    with pytest.raises(UsageError, match=r"002-001/qa_1.mp3 stands for two questions"):
        heard(tmp_path, *samples)
    touch(tmp_path, "002-001_qa_1_t.mp3", "002-001_qa_1_u.mp3")
    assert heard(tmp_path, *samples) == ["002-001_qa_1_t.mp3", "002-001_qa_1_u.mp3"]


@pytest.mark.parametrize(
    ("one", "other", "name"),
    [
        ({"id": "3_4", "video": "2"}, {"id": "4", "video": "2_3"}, "2_3_4_t.mp3"),  # two samples, one composite name
        ({"id": "4", "video": "2"}, {"id": "2_4_t", "video": "9"}, "2_4_t.mp3"),  # an id that is another's composite
    ],
)
def test_a_name_that_stands_for_two_questions_in_different_ways_serves_neither(tmp_path, one, other, name):
    touch(tmp_path, name)
    with pytest.raises(UsageError, match=r"stands for two questions"):
        heard(tmp_path, sample(**one), sample(**other, question="B?", line=2))


def test_the_file_name_tells_the_wording(tmp_path):
    touch(tmp_path, "in_002-001/qa_1.mp3", "out_002-001/qa_1.mp3")
    assert heard(tmp_path, sample(file="x/in_002-001.jsonl")) == ["in_002-001/qa_1.mp3"]
    assert heard(tmp_path, sample(file="x/out_002-001.jsonl")) == ["out_002-001/qa_1.mp3"]


def test_the_other_wording_is_never_heard(tmp_path):
    root = touch(tmp_path / "in_002-001", "qa_1.mp3", "002-001_qa_1_t.mp3")
    touch(tmp_path, "in_002-001/qa_1.mp3")
    for folder in (root, tmp_path):
        with pytest.raises(MissingFile, match=r"out_002-001.jsonl needs the out-template wording"):
            heard(folder, sample(file="out_002-001.jsonl"))


def test_two_wordings_are_told_apart_by_their_question_sets(tmp_path):
    audio = touch(tmp_path / "audio", "in_002-001/qa_1.mp3", "out_002-001/qa_1.mp3")
    file = str(tmp_path / "data/train.jsonl")
    both = [sample(question="A?", file=file), sample(question="B?", file=file, line=2)]
    with pytest.raises(UsageError) as error:
        heard(audio, both[0])
    assert "in_002-001/qa_1.mp3" in str(error.value) and "out_002-001/qa_1.mp3" in str(error.value)

    write(tmp_path / "data/in_002-001.jsonl", record(question="a? "))
    write(tmp_path / "data/out_002-001.jsonl", record(question="B?"))
    assert heard(audio, *both) == ["in_002-001/qa_1.mp3", "out_002-001/qa_1.mp3"]
    with pytest.raises(UsageError, match="two spoken questions fit"):
        heard(audio, sample(question="C?", file=file))

    write(tmp_path / "data/in_002-001.jsonl", record(question="A?"), record(question="B?"))
    with pytest.raises(UsageError, match=r"in_002-001/qa_1.mp3 stands for two questions"):
        heard(audio, *both)


# --- labels -----------------------------------------------------------------------------------------------------------


def test_majority_accuracy_is_by_type_and_blind_to_case():
    def labelled(kind, label):
        return Sample("i", "v", ("v_1",), "q", kind, "a", label)

    samples = [labelled("a", x) for x in ("no", "No ", "yes")] + [
        labelled("b", x) for x in ("up", "up", "down", "left")
    ]
    assert majority_accuracy(samples) == 4 / 7
    assert majority_accuracy([]) == 0


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="no shared/data")
def test_majority_accuracy_of_the_real_file():
    samples = read_samples(REAL_DATA / "in_002-001.jsonl")
    by_type: dict = {}
    for s in samples:
        by_type.setdefault(s.question_type, []).append(s.short_answer)
    hits = sum(max(labels.count(label) for label in labels) for labels in by_type.values())
    assert majority_accuracy(samples) == hits / 50 == 0.84
