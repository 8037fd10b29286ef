"""Scoring of answers against labels: the published keyword accuracy and a stricter one beside it. Pure text, no torch.

**Keyword accuracy** is the published metric: `short_answer.lower() in predicted.lower()`. It counts "no" inside
"normal".

**Word accuracy** is what the dataset's paper counts: the label between word boundaries (a regular expression's `\\b`):
"no" in "normal" does not count, "left" in "upper-left" still does.

**Label accuracy** asks whether the answer states the label, and no other label of its question type:

- A label counts only as whole words: "no" in "normal", "5" in "<5" or "left" in "upper-left" is not stated.
- yes/no questions: the first "yes" or "no" of the answer decides ("No, the scope is not moving" states no).
- Other labels: one that follows a negation in the same clause is not stated ("not in the rectum but in the sigma"
  states sigma alone). An answer that states two labels, or none, is wrong.
- Where the reference answers of a label inflect it ("down" is always "downward", "complete" is "completely"), that
  inflected word states the label too; the reference answers themselves therefore score 100 %.

Whatever is label-correct is also keyword-correct. **Majority accuracy** is what always answering each question type's
most frequent label would reach; **training majority accuracy** takes that label from the training, as one who has not
seen the evaluation must: the figure to beat. Types with more than one label in the file are **informative**: all
accuracies are also given over these alone.

Intervals hold for 95 % and are clustered where the samples' frames are known (evaluation/interval.py).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from surgvqa.data.jsonl import BadLine, BlankLine, read_objects, text_field
from surgvqa.errors import UsageError
from surgvqa.evaluation.interval import interval
from surgvqa.untrusted import printable

IDS = ("question_id", "video_id")
OPTIONAL_TEXT = ("ground_truth", "question", *IDS)
POLAR = ("yes", "no")
NEGATION = r"\b(?:no|not|never|without|neither|nor|cannot|\w+n't)\b"
CLAUSE_END = r"[,.;:!?](?!\d)|\b(?:but|instead|rather|although|while)\b"
METRICS = ("keyword", "word", "label")
OTHER = "(other)"
"""Column of a confusion table for answers that state none of the type's labels, or several."""
PREDICTED_SHOWN = 8
"""Different answers of a type that a report lists, the most frequent ones."""
COLLAPSE_SHARE = 0.9  # one label in more than this share of a type's predictions


def keyword_correct(short_answer: str, predicted: str) -> bool:
    """The published metric: the label occurs anywhere in the answer, also inside another word."""
    return short_answer.lower() in predicted.lower()


def word_correct(short_answer: str, predicted: str) -> bool:
    r"""As the dataset's paper counts: the label occurs between word boundaries, `\\blabel\\b`."""
    return re.search(rf"\b{re.escape(short_answer.lower().strip())}\b", predicted.lower()) is not None


class LabelSet:
    """The labels of one question type and the words that state them.

    `references` are (label, reference answer) pairs of that type; labels are compared in lower case.
    """

    def __init__(self, references: Iterable[tuple[str, str]]):
        answers: dict[str, set[str]] = defaultdict(set)
        for label, answer in references:
            answers[label.lower().strip()].add(answer.lower())
        self.polar = any(label in POLAR for label in answers)
        self.spellings: dict[str, str] = {}  # what an answer says -> the label that it states
        for label, sentences in answers.items():
            self.spellings[label] = label
            if not any(_whole(label).search(sentence) for sentence in sentences):
                for sentence in sentences:
                    for word in re.findall(rf"(?<!\w){re.escape(label)}\w+", sentence):
                        self.spellings.setdefault(word, label)
        others = sorted((s for s in self.spellings if s and s not in POLAR), key=len, reverse=True)
        self._others = _whole(*others) if others else None

    def stated(self, predicted: str) -> set[str]:
        """The labels that the answer states, by the rules at the top of this module."""
        text, found = predicted.lower().replace("’", "'"), set()
        if self.polar and (first := _whole(*POLAR).search(text)):
            found.add(first.group())
        for match in self._others.finditer(text) if self._others else ():
            clause = re.split(CLAUSE_END, text[: match.start()])[-1]
            if not re.search(NEGATION, clause):
                found.add(self.spellings[match.group()])
        return found

    def predicted_label(self, predicted: str) -> str:
        """The one label that the answer states, else the answer itself without case and final stop."""
        stated = self.stated(predicted)
        return stated.pop() if len(stated) == 1 else predicted.lower().strip().rstrip(".")


def _whole(*words: str) -> re.Pattern[str]:
    """Any of `words`, longest first, as whole words; hyphens, < and > and decimals bind ("upper-left", "<5", "0.5")."""
    return re.compile(rf"(?<![\w<>-])(?<!\d\.)(?:{'|'.join(map(re.escape, words))})(?![\w-]|\.\d)")


def score(
    predictions: list[dict[str, Any]],
    *,
    clusters: Sequence[int] | None = None,
    training: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Scores predictions in place and returns the report, all accuracies in 0..1.

    Each prediction has `question_type`, `short_answer`, `predicted_answer` and, if known, `ground_truth` (the reference
    sentence); it gains `keyword_correct`, `word_correct` and `label_correct`. A type is collapsed when it has at least
    two labels and more than 90 % of its predictions are one label, or some label is never predicted.

    `clusters`: the cluster of each prediction's sample (data.clusters), for the intervals. `training`: {question type:
    its most frequent label in the training}, whose accuracy here is then reported too.
    """
    if not predictions:
        raise UsageError("no predictions to score")
    types: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for prediction in predictions:
        types[prediction["question_type"]].append(prediction)
    by_type = {name: _score_type(group, training) for name, group in sorted(types.items())}

    several = {name for name, row in by_type.items() if len(row["labels"]) > 1}
    informative = [p for p in predictions if p["question_type"] in several]
    report: dict[str, Any] = {"samples": len(predictions), **_accuracies(predictions, training)}
    for metric in METRICS:
        report[f"{metric}_interval"] = interval([p[f"{metric}_correct"] for p in predictions], clusters)
    report["clusters"] = len(set(clusters)) if clusters is not None else None
    if clusters is not None:  # for comparison: as if the samples were independent
        report["keyword_interval_plain"] = interval([p["keyword_correct"] for p in predictions])
    report["informative"] = {"types": len(several), "samples": len(informative), **_accuracies(informative, training)}
    report["by_type"] = by_type
    report["collapsed_types"] = [name for name, row in by_type.items() if row["collapsed"]]
    return report


def _accuracies(group: Sequence[dict[str, Any]], training: Mapping[str, str] | None) -> dict[str, float]:
    """Every accuracy of some scored predictions: the metrics', the majority's and, if known, the training majority's.
    0 where there is no prediction."""
    total = max(1, len(group))
    labels: dict[str, Counter[str]] = defaultdict(Counter)
    for p in group:
        labels[p["question_type"]][_label(p)] += 1
    found = {f"{metric}_accuracy": sum(p[f"{metric}_correct"] for p in group) / total for metric in METRICS}
    found["majority_accuracy"] = sum(max(counts.values()) for counts in labels.values()) / total
    if training is not None:
        found["train_majority_accuracy"] = sum(training.get(p["question_type"]) == _label(p) for p in group) / total
    return found


def _label(prediction: dict[str, Any]) -> str:
    return str(prediction["short_answer"]).lower().strip()


def _score_type(group: list[dict[str, Any]], training: Mapping[str, str] | None) -> dict[str, Any]:
    """Scores the predictions of one question type in place; its row of the report."""
    labels = LabelSet((p["short_answer"], p.get("ground_truth") or "") for p in group)
    for p in group:
        p["keyword_correct"] = keyword_correct(p["short_answer"], p["predicted_answer"])
        p["word_correct"] = word_correct(p["short_answer"], p["predicted_answer"])
        p["label_correct"] = labels.stated(p["predicted_answer"]) == {_label(p)}
    truth = Counter(map(_label, group))
    confusion: dict[str, Counter[str]] = {label: Counter() for label, _ in truth.most_common()}
    predicted: Counter[str] = Counter()
    for p in group:
        said = labels.predicted_label(p["predicted_answer"])
        predicted[said] += 1
        confusion[_label(p)][said if said in truth else OTHER] += 1
    collapsed, never = "", [label for label in truth if not predicted[label]]
    if len(truth) > 1:
        top, count = predicted.most_common(1)[0]
        if count > COLLAPSE_SHARE * len(group):
            collapsed = f"{count / len(group):.0%} {top[:30]!r}"
        elif never:
            few = len(never) <= 2
            collapsed = "never " + (", ".join(map(repr, never)) if few else f"{len(never)} of {len(truth)} labels")
    return {
        "n": len(group),
        **_accuracies(group, training),
        "labels": dict(truth.most_common()),
        "predicted": dict(predicted.most_common(PREDICTED_SHOWN)),
        "confusion": {label: dict(counts.most_common()) for label, counts in confusion.items()},
        "never_predicted": never,
        "collapsed": collapsed,
    }


def read_predictions(path: str | Path) -> list[dict[str, Any]]:
    """The predictions of a JSONL file; blank lines are skipped.

    Each line needs `question_type`, `short_answer` and `predicted_answer`. Labels and answers may be numbers and become
    text; further fields that are known must have their type. Raises UsageError with file, line and field.
    """
    predictions = []
    for number, record in read_objects(path, "a JSONL file of predictions"):
        if isinstance(record, BlankLine):
            continue
        try:
            if isinstance(record, BadLine):
                raise record
            for field in ("question_type", "short_answer"):
                record[field] = text_field(record, field, numbers=True)
            record["predicted_answer"] = text_field(record, "predicted_answer", numbers=True, empty=True)
            for field in OPTIONAL_TEXT:
                if record.get(field) is not None:
                    record[field] = text_field(record, field, numbers=field in IDS, empty=True)
        except BadLine as bad:
            raise UsageError(f"{printable(str(path))}:{number}: {bad}") from None
        predictions.append(record)
    return predictions
