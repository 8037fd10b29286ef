"""`surgvqa split`: nothing on two sides, nothing lost, the same files whatever the order, and all files or none."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from places import REAL_DATA

from surgvqa.cli.main import main
from surgvqa.data.clusters import clusters_of
from surgvqa.data.samples import Sample, read_samples
from surgvqa.prepare import split
from surgvqa.prepare.divide import divide, groups_of

REAL = [str(REAL_DATA / name) for name in ("in_002-001.jsonl", "out_002-001.jsonl")]
real_data = pytest.mark.skipif(not REAL_DATA.is_dir(), reason="no shared/data")


def record(video, id, kind="moving", label="yes", first=100):
    return {
        "id": id,
        "video_id": video,
        "frames": [f"{video}_{first + 4 * n}" for n in range(4)],
        "question": f"Is {id} moving?",
        "question_type": kind,
        "answer": f"It is: {label}.",
        "short_answer": label,
    }


def write_lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


@pytest.fixture
def file(tmp_path):
    """Ten videos of ten samples; ids repeat over the videos, and the labels are spread the same in each."""
    rows = [
        record(f"v{video}", f"q{n}", f"type{n % 2}", "yes" if n < 6 else "no", 1000 * n)
        for video in range(10)
        for n in range(10)
    ]
    return write_lines(tmp_path / "all.jsonl", rows)


def run(capsys, *arguments):
    """(exit code, stdout or its JSON, stderr)."""
    code = main(["split", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, json.loads(out) if "--json" in arguments and out else out, err


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()} if folder.exists() else {}


# --- dividing ---------------------------------------------------------------------------------------------------------


@st.composite
def some_samples(draw):
    def clip(video):
        first = draw(st.integers(0, 150))
        names = [f"{first + n}" for n in range(draw(st.integers(1, 3)))] + draw(st.sampled_from([[], ["x"]]))
        return tuple(f"{video}_{name}" for name in names)

    videos = draw(st.lists(st.sampled_from("abcd"), min_size=1, max_size=25))
    kinds, labels, ids = st.sampled_from(["t", "u"]), st.sampled_from(["yes", "no"]), st.sampled_from(["q1", "q2"])
    return [Sample(draw(ids), v, clip(v), "?", draw(kinds), "a", draw(labels), line=n) for n, v in enumerate(videos)]


def sides_of(samples, by, shares, seed):
    """{side: its samples}; None where there are too few groups."""
    groups = groups_of(samples, by)
    assert sorted(index for group in groups for index in group) == list(range(len(samples))), "each sample once"
    if len(groups) < len(shares):
        return None
    found = [[] for _ in shares]
    for group, side in zip(groups, divide(samples, groups, shares, seed)):
        found[side] += [samples[index] for index in group]
    return found


@given(some_samples(), st.sampled_from(["video", "cluster"]), st.sampled_from([[0.8, 0.2], [0.5, 0.3, 0.2]]), st.data())
def test_no_video_cluster_or_frame_is_on_two_sides_and_no_side_is_empty(samples, by, shares, data):
    seed = data.draw(st.integers(0, 3))
    sides = sides_of(samples, by, shares, seed)
    if sides is None:
        return
    assert all(sides)
    clusters = clusters_of(samples)
    for things in (
        lambda sample: sample.frames,
        lambda sample: [clusters[sample.line]],
        lambda sample: [sample.video_id] if by == "video" else [],
    ):
        of_sides = [{thing for sample in side for thing in things(sample)} for side in sides]
        assert sum(map(len, of_sides)) == len(set().union(*of_sides))
    order = data.draw(st.permutations(samples))
    again = sides_of(order, by, shares, seed)
    assert [{s.line for s in side} for side in sides] == [{s.line for s in side} for side in again]


def test_types_and_labels_are_spread_evenly_where_the_groups_allow_it():
    """Each type alone in ten videos of its own: only a split that looks at types gives two of each to eval."""
    samples = [
        Sample("q", f"{kind}{video}", (f"{kind}{video}_1",), "?", kind, "a", "yes" if video < 5 else "no")
        for kind in "abcd"
        for video in range(10)
    ]
    for seed in range(5):
        train, evaluation = sides_of(samples, "video", [0.8, 0.2], seed)
        assert sorted((s.question_type, s.label) for s in evaluation) == [(k, v) for k in "abcd" for v in ("no", "yes")]
        assert len(train) == 32
    assert len({tuple(sides_of(samples, "video", [0.8, 0.2], seed)[1]) for seed in range(5)}) > 1, "the seed matters"


# --- files ------------------------------------------------------------------------------------------------------------


def test_all_lines_once_byte_for_byte_and_the_same_whatever_the_order_of_the_files(tmp_path, capsys):
    odd = '{"id": "q0", "video_id":"w", "frames":["w_1"],  "question":"Caf\\u00e9 \u2028?", "question_type":"moving",'
    odd += ' "answer":"é", "short_answer":"yes", "more": 1.50}'
    one = tmp_path / "one.jsonl"
    one.write_bytes(b"\xef\xbb\xbf" + odd.encode() + b"\r\n" + json.dumps(record("v", "q0")).encode() + b"\r\n\r\n")
    other = tmp_path / "other.jsonl"
    other.write_bytes(json.dumps(record("u", "q0", label="no")).encode())  # no end of line
    expected = {odd.encode() + b"\r\n", json.dumps(record("v", "q0")).encode() + b"\r\n", other.read_bytes() + b"\n"}
    a, b = tmp_path / "a", tmp_path / "b"
    assert run(capsys, one, other, "--eval_share", 0.4, "--output", a)[0] == 0
    assert run(capsys, other, one, one, "--eval_share", 0.4, "--output", b)[0] == 0
    assert contents(a) == contents(b) and sorted(contents(a)) == ["eval.jsonl", "train.jsonl"]
    lines = [line for content in contents(a).values() for line in content.splitlines(keepends=True)]
    assert len(lines) == 3 and set(lines) == expected


def test_the_balance_that_was_reached(file, tmp_path, capsys):
    code, data, _ = run(capsys, file, "--output", tmp_path / "s", "--test_share", 0.1, "--json")
    assert code == 0 and data["warnings"] == [] and data["samples"] == 100
    assert {name: side["samples"] for name, side in data["sides"].items()} == {"train": 70, "eval": 20, "test": 10}
    for side in data["sides"].values():
        assert side["samples"] == len(read_samples(side["file"])) and side["clusters"] == 10 * len(side["videos"])
    assert data["by_type"]["type1"]["sides"] == {"train": 35, "eval": 10, "test": 5}
    assert data["by_type"]["type1"]["labels"]["no"] == {"train": 14, "eval": 4, "test": 2}
    code, out, _ = run(capsys, file, "--output", tmp_path / "t")
    assert "type1" in out and "eval %" in out and "80.0" in out


def test_what_the_split_could_not_do_is_said(tmp_path, capsys):
    rows = [record("v", f"q{n}") for n in range(9)] + [record("w", "q", "still", "nev\u202eer\x1b")]
    file = write_lines(tmp_path / "all.jsonl", rows)
    code, data, _ = run(capsys, file, "--eval_share", 0.3, "--output", tmp_path / "s", "--json")
    said = "\n".join(data["warnings"])
    assert code == 0 and "eval has 10.0 % of the samples instead of 30.0 %" in said
    assert "train has no sample of still" in said and "labels that train does not have: still: nev" in said
    _, out, _ = run(capsys, file, "--eval_share", 0.3, "--output", tmp_path / "t")
    assert "\\x1b" in out and not {"\x1b", "\u202e"} & set(out)


@real_data
def test_the_real_files_are_of_one_video_and_divided_by_clusters_alone(tmp_path, capsys):
    code, _, err = run(capsys, *REAL, "--output", tmp_path / "s")
    assert code == 2 and "one video, 002-001" in err and "--by cluster" in err and not (tmp_path / "s").exists()
    code, data, _ = run(capsys, *REAL, "--by", "cluster", "--output", tmp_path / "s", "--json")
    assert code == 0 and data["sides"]["eval"]["samples"] in range(18, 23)
    assert "1 video is in more than one file" in data["warnings"][-1]
    samples = [read_samples(side["file"]) for side in data["sides"].values()]
    clusters = clusters_of(samples[0] + samples[1])
    assert not set(clusters[: len(samples[0])]) & set(clusters[len(samples[0]) :])
    assert [side["clusters"] for side in data["sides"].values()] == [len(set(clusters_of(side))) for side in samples]
    lines = [line for path in REAL for line in Path(path).read_bytes().splitlines(keepends=True)]
    assert sorted(b"".join(contents(tmp_path / "s").values()).splitlines(keepends=True)) == sorted(lines)


# --- refusing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"{}\n", "all.jsonl:1: id is missing"),
        (b"[1]\n", "expected a JSON object"),
        (b"\xff\xfe{\0", "UTF-16"),
        (b'{"id": \n', "not JSON"),
        (None, "No such file"),
    ],
)
def test_a_broken_file_is_one_line_and_nothing_is_written(tmp_path, capsys, content, said):
    file = tmp_path / "all.jsonl"
    if content is not None:
        file.write_bytes(content)
    code, out, err = run(capsys, file, "--output", tmp_path / "s")
    assert (code, out, err.count("\n")) == (2, "", 1) and said in err and not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--eval_share", "0"], "eval_share"),
        (["--eval_share", "nan"], "eval_share"),
        (["--eval_share", "0.5", "--test_share", "0.5"], "no training samples"),
        (["--by", "frame"], "by"),
        (["--output", "all.jsonl"], "is a file"),
        (["--output", "no/where"], "no such folder"),
    ],
)
def test_options_that_make_no_split(file, tmp_path, capsys, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, file, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1) and said in err and os.listdir(tmp_path) == ["all.jsonl"]


def test_fewer_videos_than_files(tmp_path, capsys):
    file = write_lines(tmp_path / "all.jsonl", [record("v", "q"), record("w", "q")])
    code, _, err = run(capsys, file, "--test_share", 0.2, "--output", tmp_path / "s")
    assert code == 2 and "2 videos for 3 files" in err


def test_a_pipe_is_refused_because_it_cannot_be_read_twice(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    code, _, err = run(capsys, tmp_path / "pipe", "--output", tmp_path / "s")
    assert code == 2 and "not a regular file" in err


def test_an_earlier_split_is_replaced_by_force_alone_and_as_a_whole(file, tmp_path, capsys):
    folder = tmp_path / "s"
    assert run(capsys, file, "--test_share", 0.2, "--output", folder)[0] == 0
    (folder / "notes.txt").write_text("kept")
    before = contents(folder)
    code, _, err = run(capsys, file, "--output", folder)
    assert code == 2 and "--force" in err and contents(folder) == before
    assert run(capsys, file, "--output", folder, "--force")[0] == 0
    assert sorted(contents(folder)) == ["eval.jsonl", "notes.txt", "train.jsonl"], "no test.jsonl that train now holds"


def test_a_file_to_split_is_never_replaced(file, tmp_path, capsys):
    os.rename(file, tmp_path / "train.jsonl")
    before = contents(tmp_path)
    code, _, err = run(capsys, tmp_path / "train.jsonl", "--output", tmp_path, "--force")
    assert code == 2 and "one of the files to split" in err and contents(tmp_path) == before


@pytest.mark.parametrize("fails_at", range(6))
@pytest.mark.parametrize("earlier", [True, False])
def test_all_files_or_none(file, tmp_path, capsys, monkeypatch, fails_at, earlier):
    """A full disk or a folder that becomes read-only, at each write and each rename in turn."""
    folder = tmp_path / "s"
    if earlier:
        run(capsys, file, "--output", folder)
    before, calls = contents(folder), []

    def failing(real):
        def step(*arguments):
            calls.append(arguments)
            if len(calls) == fails_at + 1:
                raise OSError(28, "No space left on device")
            return real(*arguments)

        return step

    monkeypatch.setattr(split, "write_synced", failing(split.write_synced))
    monkeypatch.setattr(split.os, "rename", failing(os.rename))
    code, _, err = run(capsys, file, "--output", folder, "--split_seed", 7, "--force")
    if len(calls) > fails_at:
        assert code == 1 and "No space left on device; nothing was changed" in err and contents(folder) == before
        assert folder.exists() == earlier
    else:
        assert not earlier and code == 0 and sorted(contents(folder)) == ["eval.jsonl", "train.jsonl"]


def test_a_read_only_folder(file, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "s"
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):  # root may write anywhere

        def refuse(path, _):
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(split, "write_synced", refuse)
    code, _, err = run(capsys, file, "--output", folder)
    assert code == 1 and "cannot be written: Permission denied" in err and contents(folder) == {}
