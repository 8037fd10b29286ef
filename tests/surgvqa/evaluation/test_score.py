"""Scoring: the published figure reproduced, and the stricter metric's rules one by one."""

import json
import math
import re
from collections import Counter
from pathlib import Path

import pytest
from places import REAL_DATA

from surgvqa.errors import UsageError
from surgvqa.evaluation.definitions import DEFINITIONS
from surgvqa.evaluation.score import LabelSet, keyword_correct, read_predictions, score
from surgvqa.evaluation.text_scores import text_scores

needs_real_data = pytest.mark.skipif(not REAL_DATA.is_dir(), reason=f"{REAL_DATA} is not here")

DIRECTION = LabelSet(
    [
        ("down", "The lesion shifts downward across the frames."),
        ("up", "The lesion shifts upward across the frames."),
        ("left", "The lesion drifts toward the left side of the screen."),
        ("right", "The lesion drifts toward the right side of the screen."),
        ("stable", "The lesion stays stable without noticeable movement."),
    ]
)
POLAR = LabelSet([("no", "No, the scope is not moving in these frames."), ("yes", "Yes, the scope is moving.")])


@needs_real_data
def test_published_keyword_accuracy_is_reproduced():
    predictions = read_predictions(REAL_DATA / "predictions_qwen2_zeroshot.jsonl")
    report = score(predictions)
    assert report["samples"] == 1000
    assert report["keyword_accuracy"] == pytest.approx(0.36, abs=1e-9)
    assert report["label_accuracy"] <= report["keyword_accuracy"]
    assert not any(p["label_correct"] and not p["keyword_correct"] for p in predictions)
    assert sum(row["n"] for row in report["by_type"].values()) == 1000
    assert "lesion_motion_direction" in report["collapsed_types"]  # "Right." fifty times
    assert "scope_outside" not in report["collapsed_types"]
    assert "tool_identification" not in report["collapsed_types"]  # one label in the truth: nothing to tell apart


@needs_real_data
@pytest.mark.parametrize("name", ["in_002-001.jsonl", "out_002-001.jsonl"])
def test_reference_answers_score_full_marks(name):
    samples = [json.loads(line) for line in (REAL_DATA / name).read_text().splitlines()]
    report = score([{**s, "ground_truth": s["answer"], "predicted_answer": s["answer"]} for s in samples])
    assert report["label_accuracy"] == report["keyword_accuracy"] == 1.0


@needs_real_data
def test_reference_answers_of_the_prediction_file_score_full_marks():
    predictions = read_predictions(REAL_DATA / "predictions_qwen2_zeroshot.jsonl")
    assert score([{**p, "predicted_answer": p["ground_truth"]} for p in predictions])["label_accuracy"] == 1.0


@pytest.mark.parametrize(
    ("labels", "answer", "stated"),
    [
        (POLAR, "No, the scope is not moving.", {"no"}),
        (POLAR, "The mucosa looks normal.", set()),  # "no" inside "normal"
        (POLAR, "Yes, there is no obstruction.", {"yes"}),
        (POLAR, "It is nothing", set()),
        (DIRECTION, "The lesion drifts toward the left side.", {"left"}),
        (DIRECTION, "DOWNWARD", {"down"}),
        (DIRECTION, "It goes down.", {"down"}),
        (DIRECTION, "The download is stable", {"stable"}),
        (DIRECTION, "Not left but right.", {"right"}),
        (DIRECTION, "It isn't moving to the right", set()),
        (DIRECTION, "left or right", {"left", "right"}),
        (DIRECTION, "upper-left corner", set()),
        (DIRECTION, "", set()),
        (LabelSet([("<5", "The lesion is <5 mm."), ("5-10", "The lesion is 5-10 mm.")]), "It is <5 mm.", {"<5"}),
        (LabelSet([("<5", ""), ("5-10", "")]), "<50 mm", set()),
        (LabelSet([("<5", ""), ("5-10", "")]), "<5.5 mm", set()),
        (LabelSet([("upper left", ""), ("left", "")]), "in the upper left", {"upper left"}),
        (LabelSet([("complete", "It completely hides the view."), ("absent", "")]), "completely", {"complete"}),
        (LabelSet([("complete", "It is complete."), ("absent", "")]), "completely", set()),
        (LabelSet([("NBI", ""), ("WL", "")]), "No, WL light is on instead.", {"wl"}),
    ],
)
def test_stated_labels(labels, answer, stated):
    assert labels.stated(answer) == stated


def test_keyword_metric_is_the_lenient_one():
    assert keyword_correct("no", "Normal mucosa") and keyword_correct("NBI", "nbi light")
    assert not keyword_correct("upper-left", "Upper left.")


def test_collapse_needs_two_labels_in_the_truth():
    def prediction(kind, truth, said):
        return {"question_type": kind, "short_answer": truth, "predicted_answer": said}

    report = score(
        [prediction("one", "no", "no")] * 5
        + [prediction("same", "no", "yes"), prediction("same", "yes", "yes")]
        + [prediction("never", x, y) for x, y in (("a", "a"), ("b", "b"), ("c", "a"))]
        + [prediction("fine", "no", "no"), prediction("fine", "yes", "yes")]
    )
    assert report["collapsed_types"] == ["never", "same"]
    assert report["by_type"]["never"]["collapsed"] == "never 'c'"
    assert report["majority_accuracy"] == pytest.approx((5 + 1 + 1 + 1) / 12)


GOOD = '{"question_type": "t", "short_answer": "no", "predicted_answer": "No."}'


@pytest.mark.parametrize(
    "content",
    [
        GOOD.encode("utf-8-sig"),
        f"{GOOD}\r\n\r\n{GOOD}\r\n".encode(),
        GOOD.replace("No.", "No.\u2028Clean.").encode(),
        GOOD.replace("No.", "No.\u0085Clean.").encode(),
        f'{GOOD[:-1]}, "question_id": 7, "video_id": null, "ground_truth": null}}'.encode(),
        GOOD.replace('"no"', "5").replace("No.", "About 5 mm.").encode(),
        GOOD.replace('"no"', "2.5").replace('"No."', "2.5").encode(),
    ],
)
def test_prediction_files_as_people_have_them(tmp_path, content):
    file = tmp_path / "p.jsonl"
    file.write_bytes(content)
    report = score(read_predictions(file))
    assert report["keyword_accuracy"] == report["label_accuracy"] == 1.0


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", ":1: not JSON"),
        ('{"question_type": "a", "short_answer": "b"}', ":1: predicted_answer is missing, expected text"),
        ("[1]", ":1: the line is a list, expected a JSON object"),
        ("\n", ": empty, expected one JSON object per line"),
        (f"{GOOD}\n\n{GOOD[:-1]}, {GOOD[1:]}", ":3: question_type is given twice"),
        (f'{GOOD[:-1]}, "ground_truth": 5}}', ":1: ground_truth is a number, expected text"),
        (f'{GOOD[:-1]}, "question": ["?"]}}', ":1: question is a list, expected text"),
        (f'{GOOD[:-1]}, "note": "\\ud800"}}', ":1: note holds half of a surrogate pair"),
        (GOOD.replace('"no"', "true"), ":1: short_answer is true or false, expected text"),
        (GOOD.replace('"no"', '" "'), ":1: short_answer is empty, expected text"),
        (GOOD.replace('"No."', "null"), ":1: predicted_answer is null, expected text"),
    ],
)
def test_bad_prediction_files_are_named(tmp_path, text, problem):
    file = tmp_path / "p.jsonl"
    file.write_text(text)
    with pytest.raises(UsageError, match=r"p\.jsonl") as caught:
        read_predictions(file)
    assert problem in str(caught.value)
    with pytest.raises(UsageError, match="No such file or directory, expected a JSONL file of predictions"):
        read_predictions(tmp_path / "absent.jsonl")


# --- sentences --------------------------------------------------------------------------------------------------------

PAIRS = [
    ("The lesion is on the left.", "The lesion is on the right."),
    ("Yes.", "Yes, the scope is moving."),
    ("", "The view is clear and clean now."),
    ("The scopes are moving fast", "The scope is moving fast"),
]


def grams(text: str, n: int) -> list[tuple[str, ...]]:
    words = re.findall(r"[A-Za-z]+|[.,]", text)
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def test_sentence_scores_against_their_formulas():
    pytest.importorskip("sacrebleu")
    found = text_scores(*zip(*PAIRS, ("Anything", None), ("Nothing", " ")))
    assert found["samples"] == 4
    precisions = []
    for n in range(1, 5):
        said = [Counter(grams(a, n)) for a, _ in PAIRS]
        hits = sum((s & Counter(grams(r, n))).total() for s, (_, r) in zip(said, PAIRS))
        precisions.append(hits / sum(s.total() for s in said))
    lengths = [sum(len(grams(pair[side], 1)) for pair in PAIRS) for side in (0, 1)]
    penalty = math.exp(1 - lengths[1] / lengths[0])
    assert found["precision_4gram"] == pytest.approx(precisions[3]) == pytest.approx(2 / 6)
    assert found["brevity_penalty"] == pytest.approx(penalty)
    assert found["bleu_4"] == pytest.approx(penalty * math.prod(precisions) ** 0.25)
    # longest common subsequences 5 of 6 and 6 words, 1 of 1 and 5, 0, 3 of 5 and 5
    assert found["rouge_l"] == pytest.approx((5 / 6 + 2 * 0.2 / 1.2 + 0 + 3 / 5) / 4)
    # matched 6 of 7 and 7 tokens in 2 chunks; 2 of 2 and 7 in 2; none; 4 (scopes by its stem) of 5 and 5 in 2
    by_hand = []
    for matched, answer, reference, chunks in ((6, 7, 7, 2), (2, 2, 7, 2), (4, 5, 5, 2)):
        precision, recall = matched / answer, matched / reference
        mean = precision * recall / (0.9 * precision + 0.1 * recall)
        by_hand.append(mean * (1 - 0.5 * (chunks / matched) ** 3))
    assert found["meteor"] == pytest.approx(sum(by_hand) / 4)
    with pytest.raises(UsageError, match="no prediction has a ground_truth"):
        text_scores(["a"], [None])


def test_reference_sentences_have_full_marks_and_a_wrong_label_nearly():
    """What misleads about them: one word of twelve decides."""
    pytest.importorskip("sacrebleu")
    reference = "The lesion drifts toward the left side of the screen in this clip."
    same, wrong = (text_scores([said], [reference]) for said in (reference, reference.replace("left", "right")))
    assert same["bleu_4"] == pytest.approx(1) and same["rouge_l"] == 1
    assert wrong["rouge_l"] > 0.9 and wrong["meteor"] > 0.9 and wrong["bleu_4"] > 0.6


def test_docs_and_report_define_the_scores_alike():
    text = (Path(__file__).parents[3] / "docs" / "scores.md").read_text()
    assert [d.name for d in DEFINITIONS if not all(part in text for part in d)] == []
