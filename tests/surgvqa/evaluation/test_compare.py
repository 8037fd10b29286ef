"""Comparisons against figures computed another way, and the files that are refused."""

import json
import math
import re
from collections import defaultdict
from pathlib import Path

import pytest
from places import REAL_DATA

from surgvqa.cli.main import main
from surgvqa.config.workspace import load_workspace
from surgvqa.data.clusters import clusters_of
from surgvqa.data.samples import read_samples
from surgvqa.errors import UsageError
from surgvqa.evaluation.compare import pair
from surgvqa.evaluation.interval import interval, paired_interval, standard_error
from surgvqa.evaluation.paired import clusters_needed, detectable, mcnemar
from surgvqa.evaluation.sources import find_source

LABELS = ("yes", "no", "no", "yes", "no", "no")
STARTS = (0, 30, 50, 1000, 2000, 2010)
"""Of clips of 20 frames; the first three and the last two lie within a second of each other."""


def sample(number: int) -> dict:
    frames = [f"v_{STARTS[number]}", f"v_{STARTS[number] + 20}"]
    kind = "a" if number < 3 else "b"
    return {"id": f"qa_{number}", "video_id": "v", "frames": frames, "question": f"Is it {kind}?",
            "question_type": kind, "answer": f"It is {LABELS[number]}.", "short_answer": LABELS[number]}  # fmt: skip


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def line(number: int, answer: str, **changes) -> dict:
    row = sample(number)
    said = {"question_id": row["id"], "question_type": row["question_type"], "question": row["question"]}
    return {**said, "short_answer": row["short_answer"], "predicted_answer": answer, **changes}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Samples; a model that always says no; one that says yes. Right before: 0 1 1 0 1 1, after: 1 0 0 1 0 0."""
    monkeypatch.chdir(tmp_path)
    evaluation = write(tmp_path / "eval.jsonl", map(sample, range(6)))
    before = write(tmp_path / "before.jsonl", [line(n, "No.") for n in range(6)])
    after = write(tmp_path / "after.jsonl", [line(n, "Yes.") for n in reversed(range(6))])
    return evaluation, before, after


# --- arithmetic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gained", "lost", "p"), [(0, 0, 1), (1, 0, 1), (5, 0, 1 / 16), (3, 3, 1), (9, 1, 22 / 1024)])
def test_mcnemar_by_hand(gained, lost, p):
    assert mcnemar(gained, lost) == mcnemar(lost, gained) == pytest.approx(p)


@pytest.mark.parametrize(("gained", "lost"), [(85, 7), (40, 61), (300, 260), (2000, 1500)])
def test_mcnemar_against_the_tail_summed_in_logarithms(gained, lost):
    flips = gained + lost
    logs = [math.lgamma(flips + 1) - math.lgamma(k + 1) - math.lgamma(flips - k + 1) - flips * math.log(2)
            for k in range(min(gained, lost) + 1)]  # fmt: skip
    assert mcnemar(gained, lost) == pytest.approx(min(1.0, 2 * math.fsum(map(math.exp, logs))), rel=1e-9)


def test_a_paired_interval_by_hand():
    differences, clusters = [1, 1, 0, -1, 0, 0], [0, 0, 1, 1, 2, 3]
    # mean 1/6; residual sums 10/6, -8/6, -1/6, -1/6: squares (100 + 64 + 1 + 1)/36
    half = 1.96 * math.sqrt(166 / 36 * 4 / 3) / 6
    assert paired_interval(differences, clusters) == pytest.approx([1 / 6 - half, 1 / 6 + half])
    assert paired_interval([1, -1], [5, 5]) == [-1.0, 1.0] and standard_error([1, -1], [5, 5]) is None
    assert paired_interval([0, 0, 0]) == [0.0, 0.0]


def test_planning_inverts_the_interval():
    """As many clusters as are needed for a difference have that difference as what they can show."""
    error, clusters = 0.012, 80
    for difference in (0.01, 0.03, 0.2):
        needed = clusters_needed(error, clusters, difference)
        smallest = [detectable(error * math.sqrt(clusters / count)) for count in (needed, needed - 1)]
        assert smallest[0] <= difference and (smallest[1] > difference or needed == 2)
    assert clusters_needed(0.012, 80, 0.03) == 101  # (2.8016 · 0.4)² · 80 = 100.5


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_pairs_by_sample_and_clusters(files, capsys):
    evaluation, before, after = files
    given = ["compare", before, after, "--eval_data_path", evaluation]
    assert main([*given, "--detect", "50", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    clusters = clusters_of(read_samples(evaluation))
    assert report["samples"] == 6 and report["clusters"] == 3 == len(set(clusters))
    expected = [1, -1, -1, 1, -1, -1]
    assert report["difference"] == pytest.approx(-2 / 6)
    assert report["interval"] == pytest.approx(paired_interval(expected, clusters))
    assert report["mcnemar_p"] == pytest.approx(mcnemar(2, 4)) == pytest.approx(44 / 64)
    assert [(f["question_id"], f["gained"]) for f in report["flips"]] == [(f"qa_{n}", n in (0, 3)) for n in range(6)]
    assert report["by_type"]["a"]["difference"] == pytest.approx(-1 / 3) and report["by_type"]["a"]["lost"] == 2
    assert report["by_type"]["a"]["interval"] == [-1.0, 1.0], "one cluster"
    error = standard_error(expected, clusters)
    assert report["clusters_needed"] == clusters_needed(error, 3, 0.5) and report["warnings"] == []

    third = write(Path("same.jsonl"), [line(n, "No.") for n in range(6)])
    assert main([*given[:3], third, "--metric", "label"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "before (before) and after (after), 6 samples" in shown and "before (before) and same (after)" in shown
    assert "-33.3" in shown and "treats the samples as independent" in shown and "is unknown" in shown


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([line(n, "No.") for n in range(5)], r"1 in .*before.jsonl and not in .*other.jsonl \(qa_5\)"),
        ([line(n, "No.") for n in (*range(6), 5)], r"1 in .*other.jsonl and not in .*before.jsonl \(qa_5\)"),
        ([line(n, "No.", short_answer="yes") for n in range(6)], "qa_1: the label is 'no' in .* and 'yes' in"),
        ([line(n, "No.", question="Else?") for n in range(6)], "6 differ only in the question's wording"),
        ([line(n, "No.", question_id=None, question=None) for n in range(6)], "no question_id and no question"),
    ],
)
def test_other_samples_are_refused_and_named(files, tmp_path, capsys, rows, told):
    assert main(["compare", files[1], write(tmp_path / "other.jsonl", rows)]) == 2
    assert re.search(told, capsys.readouterr().err)


def test_ids_that_repeat_are_told_apart_by_video_and_by_wording():
    here = [
        line(0, "a", video_id="v"),
        line(0, "b", video_id="w"),
        line(0, "c", video_id="v", question="B?"),
        line(0, "d", video_id="v"),
    ]
    assert pair(here, here[::-1], "a", "b") == [here[3], here[1], here[2], here[0]], "the same twice: in order"
    without = [{**row, "video_id": None} for row in here]
    assert [p["predicted_answer"] for p in pair(here, without, "a", "b")] == ["a", "b", "c", "d"]


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="no shared/data")
def test_in_and_out_of_template_wordings_are_paired_when_asked(tmp_path, monkeypatch, capsys):
    """The same fifty samples in both wordings, answered by their reference answers."""
    monkeypatch.chdir(tmp_path)
    names = []
    for side in ("in", "out"):
        rows = [json.loads(text) for text in (REAL_DATA / f"{side}_002-001.jsonl").read_text().splitlines()]
        lines = [{**r, "question_id": r["id"], "predicted_answer": r["answer"] if side == "in" else ""} for r in rows]
        names.append(write(tmp_path / f"{side}.jsonl", lines))
    assert main(["compare", *names]) == 2
    assert "--reworded pairs them" in capsys.readouterr().err
    evaluation = str(REAL_DATA / "in_002-001.jsonl")
    assert main(["compare", *names, "--reworded", "--eval_data_path", evaluation, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["difference"] == -1.0 and report["samples"] == 50 and report["clusters"] < 50


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="no shared/data")
def test_the_published_predictions_against_the_majority_computed_another_way(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = REAL_DATA / "predictions_qwen2_zeroshot.jsonl"
    rows = [json.loads(text) for text in file.read_bytes().splitlines()]
    labels = defaultdict(list)
    for row in rows:
        labels[row["question_type"]].append(row["short_answer"])
    top = {kind: max(sorted(set(found)), key=found.count) for kind, found in labels.items()}
    always = write(tmp_path / "m.jsonl", [{**row, "predicted_answer": top[row["question_type"]]} for row in rows])
    assert main(["compare", str(file), always, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    right = [
        (r["short_answer"].lower() in r["predicted_answer"].lower(), r["short_answer"] in top[r["question_type"]])
        for r in rows
    ]
    differences = [b - a for a, b in right]
    mean = sum(differences) / 1000
    half = 1.96 * math.sqrt(sum((d - mean) ** 2 for d in differences) / 999 / 1000)
    assert report["difference"] == pytest.approx(mean)
    assert report["interval"] == pytest.approx([mean - half, mean + half])
    assert (report["gained"], report["lost"]) == (differences.count(1), differences.count(-1))
    assert len(report["flips"]) == report["gained"] + report["lost"]


def test_a_difference_of_one_model_from_nothing_is_its_accuracy():
    correct, clusters = [True, False, True, True, False], [0, 0, 1, 2, 2]
    assert paired_interval([int(c) for c in correct], clusters) == pytest.approx(interval(correct, clusters))


def test_a_run_is_a_source_and_brings_its_samples(files, tmp_path):
    folder = tmp_path / "runs" / "20260101-000000-evaluate-abc"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"command": "evaluate", "options": {"eval_data_path": {"value": "e"}}}))
    with pytest.raises(UsageError, match=r"no predictions\.jsonl"):
        find_source("20260101", load_workspace(tmp_path))
    (folder / "predictions.jsonl").write_text("")
    found = find_source("20260101", load_workspace(tmp_path))
    assert (found.name, found.run, found.options) == (folder.name, folder, {"eval_data_path": "e"})
    with pytest.raises(UsageError, match="no such file"):
        find_source("nowhere.jsonl", load_workspace(tmp_path))
