"""Intervals and baselines against figures computed another way."""

import json
import math
import re
import statistics
from collections import Counter

import pytest
from places import REAL_DATA

from surgvqa.cli.main import main
from surgvqa.data.clusters import clusters_of
from surgvqa.data.samples import Sample, read_samples
from surgvqa.errors import UsageError
from surgvqa.evaluation.interval import interval, samples_of
from surgvqa.evaluation.score import read_predictions, score, word_correct

needs_real_data = pytest.mark.skipif(not REAL_DATA.is_dir(), reason="no shared/data")


def test_without_clusters_it_is_the_usual_interval():
    correct = [True] * 36 + [False] * 64
    half = 1.96 * statistics.stdev(correct) / math.sqrt(100)
    assert interval(correct) == pytest.approx([0.36 - half, 0.36 + half])


def test_whole_clusters_of_equal_answers_count_as_one_sample_each():
    """Ten copies of each sample are no more than the samples themselves."""
    once = [True, False, False, True, False, False, False]
    assert interval([y for y in once for _ in range(10)], [n for n in range(7) for _ in range(10)]) == pytest.approx(
        interval(once)
    )


def test_a_figure_by_hand():
    # mean 0.5; residual sums 1, -0.5, -0.5; √((1 + .25 + .25) · 3/2) = 1.5
    half = 1.96 * 1.5 / 4
    assert interval([True, True, False, False], [0, 0, 1, 2]) == pytest.approx([max(0, 0.5 - half), min(1, 0.5 + half)])


def test_one_cluster_says_nothing_and_no_bound_leaves_the_shares():
    assert interval([True, False], [3, 3]) == [0.0, 1.0]
    assert interval([True]) == [0.0, 1.0]
    assert interval([True, True, True, False]) == [pytest.approx(0.75 - 0.49), 1.0]


@pytest.mark.parametrize(
    ("label", "answer", "right"),
    [
        ("no", "Normal mucosa.", False),
        ("No", "no.", True),
        ("down", "It moves downward.", False),
        ("left", "In the upper-left corner.", True),
        ("5-10", "It is 5-10 mm.", True),
        ("a.b", "axb", False),
    ],
)
def test_word_accuracy_is_a_regular_expressions_word(label, answer, right):
    assert word_correct(label, answer) is right
    assert bool(re.search(r"\b" + re.escape(label.lower()) + r"\b", answer.lower())) is right


def test_the_baselines_and_informative_types():
    def line(kind, label, answer="x"):
        return {"question_type": kind, "short_answer": label, "predicted_answer": answer}

    lines = [line("a", "yes", "yes"), line("a", "yes", "yes"), line("a", "no", "yes"), line("one", "ok", "normal ok")]
    report = score(lines, training={"a": "no", "one": "bad"})
    assert report["majority_accuracy"] == 0.75 and report["train_majority_accuracy"] == 0.25
    plain = {key: value for key, value in report["informative"].items() if not key.endswith("_interval")}
    assert report["informative"]["label_interval"] == pytest.approx(interval([True, True, False]))
    assert plain == {
        "types": 1,
        "samples": 3,
        "keyword_accuracy": pytest.approx(2 / 3),
        "word_accuracy": pytest.approx(2 / 3),
        "label_accuracy": pytest.approx(2 / 3),
        "majority_accuracy": pytest.approx(2 / 3),
        "train_majority_accuracy": pytest.approx(1 / 3),
    }
    assert report["by_type"]["a"]["confusion"] == {"yes": {"yes": 2}, "no": {"yes": 1}}
    assert report["by_type"]["a"]["never_predicted"] == ["no"]
    assert report["by_type"]["one"]["confusion"] == {"ok": {"ok": 1}}
    assert score([line("a", "yes", "maybe")])["by_type"]["a"]["confusion"] == {"yes": {"(other)": 1}}


# --- which sample a prediction answers --------------------------------------------------------------------------------


def asked(name="qa_1", video="v", question="A?") -> Sample:
    return Sample(name, video, (f"{video}_1",), question, "t", "a", "a")


def test_a_sample_is_found_by_what_the_prediction_has():
    samples = [asked(), asked(question="B?"), asked(video="w"), asked("qa_2", "w", "C?")]
    lines = [
        {"video_id": "w", "question_id": "qa_1"},
        {"question_id": "qa_1", "question": " b? "},
        {"video_id": "v", "question_id": "qa_1", "question": "A?"},
        {"question": "C?"},
    ]
    assert samples_of(lines, samples, "f") == [samples[2], samples[1], samples[0], samples[3]]
    same = [{"question_id": "qa_1", "question": "A?"}] * 2
    assert samples_of(same, samples, "f") == [samples[0], samples[2]], "in order"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ({"question_id": "qa_9"}, r"prediction 1 \(qa_9\) answers no sample of f"),
        ({"question_id": "qa_1", "video_id": "x"}, "answers no sample of f"),
        ({"video_id": "v"}, "has no question_id and no question"),
    ],
)
def test_a_prediction_without_a_sample_is_named(line, told):
    with pytest.raises(UsageError, match=told):
        samples_of([line], [asked()], "f")


# --- the command ------------------------------------------------------------------------------------------------------


@needs_real_data
def test_scores_of_the_published_predictions_computed_another_way():
    lines = [json.loads(t) for t in (REAL_DATA / "predictions_qwen2_zeroshot.jsonl").read_bytes().splitlines()]
    report = score(read_predictions(REAL_DATA / "predictions_qwen2_zeroshot.jsonl"))
    kinds = {kind: [p for p in lines if p["question_type"] == kind] for kind in {p["question_type"] for p in lines}}
    several = [kind for kind, group in kinds.items() if len({p["short_answer"] for p in group}) > 1]
    right = [p for p in lines if p["question_type"] in several and p["short_answer"] in p["predicted_answer"].lower()]
    top = sum(Counter(p["short_answer"] for p in kinds[kind]).most_common(1)[0][1] for kind in several)
    count = sum(len(kinds[kind]) for kind in several)
    assert report["majority_accuracy"] == pytest.approx(0.648)
    assert report["informative"]["types"] == len(several) == 13 and report["informative"]["samples"] == count == 650
    assert report["informative"]["keyword_accuracy"] == pytest.approx(len(right) / count)
    assert report["informative"]["majority_accuracy"] == pytest.approx(top / count)
    half = 1.96 * math.sqrt(0.36 * 0.64 / 999)
    assert report["keyword_interval"] == pytest.approx([0.36 - half, 0.36 + half])


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def row(number: int, label: str, first: int) -> dict:
    frames = [f"v_{first}", f"v_{first + 10}"]
    return {"id": f"qa_{number}", "video_id": "v", "frames": frames, "question": "Any?", "question_type": "t",
            "answer": f"It is {label}.", "short_answer": label}  # fmt: skip


def test_the_command_clusters_by_the_evaluation_and_leaves_no_run_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [row(n, "yes" if n % 3 else "no", 20 * n if n < 4 else 1000 * n) for n in range(8)]
    evaluation, training = write(tmp_path / "eval.jsonl", rows), write(tmp_path / "train.jsonl", [row(0, "no", 0)])
    lines = [
        {"question_id": r["id"], "question_type": "t", "short_answer": r["short_answer"], "predicted_answer": "Yes."}
        for r in rows
    ]
    predictions = write(tmp_path / "p.jsonl", lines)
    given = ["--eval_data_path", evaluation, "--train_data_path", training, "--output_file", "scored.jsonl"]
    assert main(["evaluate", "--predictions", predictions, *given, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["clusters"] == 5 and report["train_majority_accuracy"] == 3 / 8 and report["warnings"] == []
    assert clusters_of(read_samples(evaluation))[:4] == [0] * 4
    correct = [r["short_answer"] == "yes" for r in rows]
    assert report["keyword_interval"] == pytest.approx(interval(correct, [0, 0, 0, 0, 1, 2, 3, 4]))
    assert report["keyword_interval_plain"] == pytest.approx(interval(correct))
    assert not (tmp_path / "runs").exists() and "run" not in report
    scored = [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    assert [p["correct"] for p in scored] == [p["exact_match"] for p in scored] == [int(c) for c in correct]

    other = ["evaluate", "--predictions", predictions, "--eval_data_path", training]
    assert main([*other, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (warning,) = report["warnings"]
    assert "not clustered: prediction 2 (qa_1) answers no sample" in warning and report["clusters"] is None
    assert main(other) == 0
    assert "as if the samples were independent" in " ".join(capsys.readouterr().out.split())


def test_in_and_out_of_template_side_by_side(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    training = write(tmp_path / "train.jsonl", [row(0, "no", 0)])
    lines = [
        {"question_type": kind, "question": question, "short_answer": "no", "predicted_answer": said}
        for kind, question, said in (
            ("t", " any? ", "No."), ("t", "Any?", "Yes."), ("t", "None?", "No."), ("u", "Any?", "No."), ("t", "", "No.")
        )
    ]  # fmt: skip
    command = ["evaluate", "--predictions", write(tmp_path / "p.jsonl", lines), "--train_data_path", training]
    assert main([*command, "--json"]) == 0
    sides = json.loads(capsys.readouterr().out)["by_template"]
    assert (sides["in"]["samples"], sides["in"]["keyword_accuracy"]) == (2, 0.5)
    assert (sides["out"]["samples"], sides["out"]["label_accuracy"]) == (2, 1.0)
    assert sides["in"]["keyword_interval"] == pytest.approx(interval([True, False]))
    assert main(command) == 0
    assert "in template 2 samples, keyword 50.0 %" in " ".join(capsys.readouterr().out.split())


def test_sentence_scores_when_asked_for(tmp_path, monkeypatch, capsys):
    from surgvqa.machine import packages

    monkeypatch.chdir(tmp_path)
    line = {
        "question_type": "t",
        "short_answer": "no",
        "predicted_answer": "No it is not",
        "ground_truth": "No it is not",
    }
    command = ["evaluate", "--predictions", write(tmp_path / "p.jsonl", [line]), "--text_scores"]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text_scores"]["precision_4gram"] == 1.0
    assert main(command) == 0
    assert "ROUGE-L 100.0" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    assert main(command) == 1
    assert "pip install 'surgvqa[text-scores]'" in capsys.readouterr().err


def test_scores_written_beside_old_ones_are_ours_and_json(tmp_path, monkeypatch, capsys):
    """What a file says of itself does not survive a new scoring; a time that is no number is none."""
    monkeypatch.chdir(tmp_path)
    line = {"question_type": "t", "short_answer": "no", "predicted_answer": "Yes.", "correct": "1", "exact_match": 1}
    predictions = write(tmp_path / "p.jsonl", [{**line, "inference_time_ms": math.nan}])
    assert main(["evaluate", "--predictions", predictions, "--output_file", "o.jsonl", "--json"]) == 0
    scored = json.loads((tmp_path / "o.jsonl").read_text(), parse_constant=pytest.fail)
    assert (scored["correct"], scored["exact_match"], scored["inference_time_ms"]) == (0, 0, None)
    capsys.readouterr()
    assert main(["evaluate", "--predictions", predictions, "--resume", "last"]) == 2


def test_scoring_needs_no_torch(tmp_path, monkeypatch, capsys):
    from surgvqa.cli import main as cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    line = {"question_type": "t", "short_answer": "no", "predicted_answer": "No."}
    assert main(["evaluate", "--predictions", write(tmp_path / "p.jsonl", [line]), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["keyword_accuracy"] == 1.0
    assert main(["evaluate", "--checkpoint_path", "x", "--max_image_size", "300", "--output_file", "o.jsonl"]) == 1
    assert "pip install 'surgvqa[train]'" in capsys.readouterr().err
