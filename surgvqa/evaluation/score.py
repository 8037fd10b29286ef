"""Scores answers against labels, by the published keyword accuracy and by stricter ones. Pure text, no torch.

**Keyword accuracy** is the published metric: `short_answer.lower() in predicted.lower()`. It counts "no" inside
"normal".

**Word accuracy** is the metric of the dataset's paper: the label between word boundaries (a regular expression's
`\\b`). "no" in "normal" does not count, "left" in "upper-left" does.

**Label accuracy** is the share of answers that state the label, and no other label of its question type:

- A label counts only as whole words: "no" in "normal", "5" in "<5" or "left" in "upper-left" is not stated.
- In yes/no questions, the first "yes" or "no" of the answer decides ("No, the scope is not moving" states no).
- Another label is not stated if it follows a negation in the same clause ("not in the rectum but in the sigma" states
  only sigma). An answer that states two labels, or none, is wrong.
- If the reference answers of a label inflect it ("down" is always "downward", "complete" is "completely"), the
  inflected word states the label too. So the reference answers themselves score 100 %.

Every label-correct answer is also keyword-correct. **Majority accuracy** is the score of always answering each question
type's most frequent label. **Training majority accuracy** uses the training's most frequent label, since a model has
not seen the evaluation: this is the figure to beat. Types with more than one label in the file are **informative**: all
accuracies are also given for these alone.

Intervals are 95 % intervals, clustered if the samples' frames are known (evaluation/interval.py).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from surgvqa.data.jsonl import BadLine, BlankLine, read_objects, text_field
from surgvqa.data.samples import wording_of
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
"""Column of a confusion table for answers that state no label of the type, or several."""
PREDICTED_SHOWN = 8
"""Number of a type's most frequent answers in a report."""
COLLAPSE_SHARE = 0.9  # one label in more than this share of a type's predictions


def keyword_correct(short_answer: str, predicted: str) -> bool:
    """The published metric: whether the label occurs anywhere in the answer, even inside another word."""
    return short_answer.lower() in predicted.lower()


def word_correct(short_answer: str, predicted: str) -> bool:
    r"""The metric of the dataset's paper: whether the label occurs between word boundaries, `\\blabel\\b`."""
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
        self.spellings: dict[str, str] = {}  # {words of an answer: the label that they state}
        for label, sentences in answers.items():
            self.spellings[label] = label
            if not any(_whole_word_pattern(label).search(sentence) for sentence in sentences):
                for sentence in sentences:
                    for word in re.findall(rf"(?<!\w){re.escape(label)}\w+", sentence):
                        self.spellings.setdefault(word, label)
        others = sorted((s for s in self.spellings if s and s not in POLAR), key=len, reverse=True)
        self._others = _whole_word_pattern(*others) if others else None

    def stated(self, predicted: str) -> set[str]:
        """The labels that the answer states, by this module's rules."""
        text, found = predicted.lower().replace("’", "'"), set()
        if self.polar and (first := _whole_word_pattern(*POLAR).search(text)):
            found.add(first.group())
        for match in self._others.finditer(text) if self._others else ():
            clause = re.split(CLAUSE_END, text[: match.start()])[-1]
            if not re.search(NEGATION, clause):
                found.add(self.spellings[match.group()])
        return found

    def predicted_label(self, predicted: str) -> str:
        """The one label that the answer states, else the answer itself in lower case without its final stop."""
        stated = self.stated(predicted)
        return stated.pop() if len(stated) == 1 else predicted.lower().strip().rstrip(".")


def _whole_word_pattern(*words: str) -> re.Pattern[str]:
    """A pattern for any of `words` as whole words, longest first; hyphens, <, > and decimal points join words."""
    return re.compile(rf"(?<![\w<>-])(?<!\d\.)(?:{'|'.join(map(re.escape, words))})(?![\w-]|\.\d)")


def score(
    predictions: list[dict[str, Any]],
    *,
    clusters: Sequence[int] | None = None,
    training: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Scores predictions in place and returns the report, all accuracies in 0..1.

    Each prediction has `question_type`, `short_answer`, `predicted_answer` and, if known, `ground_truth` (the reference
    sentence). It gets `keyword_correct`, `word_correct` and `label_correct`. A type is collapsed if it has at least two
    labels and more than 90 % of its predictions are one label, or some label is never predicted.

    `clusters`: the cluster of each prediction's sample (data.clusters), for the intervals. `training`: {question type:
    its most frequent label in the training}, for training majority accuracy. Raises UsageError without predictions.
    """
    if not predictions:
        raise UsageError("no predictions to score")
    types: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for prediction in predictions:
        types[prediction["question_type"]].append(prediction)
    by_type = {name: _score_type(group, training) for name, group in sorted(types.items())}

    several = {name for name, row in by_type.items() if len(row["labels"]) > 1}
    inside = [index for index, p in enumerate(predictions) if p["question_type"] in several]
    informative = [predictions[index] for index in inside]
    report: dict[str, Any] = {"samples": len(predictions), **_accuracies(predictions, training)}
    report |= _intervals(predictions, clusters)
    report["clusters"] = len(set(clusters)) if clusters is not None else None
    if clusters is not None:  # for comparison, as if the samples were independent
        report["keyword_interval_plain"] = interval([p["keyword_correct"] for p in predictions])
    report["informative"] = {"types": len(several), "samples": len(informative), **_accuracies(informative, training)}
    if informative:
        inner = [clusters[index] for index in inside] if clusters is not None else None
        report["informative"] |= _intervals(informative, inner)
    report["by_type"] = by_type
    report["collapsed_types"] = [name for name, row in by_type.items() if row["collapsed"]]
    return report


def _accuracies(group: Sequence[dict[str, Any]], training: Mapping[str, str] | None) -> dict[str, float]:
    """Every accuracy of scored predictions: metrics, majority, training majority if known; 0 without predictions."""
    total = max(1, len(group))
    labels: dict[str, Counter[str]] = defaultdict(Counter)
    for p in group:
        labels[p["question_type"]][_label(p)] += 1
    found = {f"{metric}_accuracy": sum(p[f"{metric}_correct"] for p in group) / total for metric in METRICS}
    found["majority_accuracy"] = sum(max(counts.values()) for counts in labels.values()) / total
    if training is not None:
        found["train_majority_accuracy"] = sum(training.get(p["question_type"]) == _label(p) for p in group) / total
    return found


def _intervals(group: Sequence[dict[str, Any]], clusters: Sequence[int] | None) -> dict[str, list[float]]:
    """The 95 % interval of each metric over scored predictions."""
    return {f"{metric}_interval": interval([p[f"{metric}_correct"] for p in group], clusters) for metric in METRICS}


def _label(prediction: dict[str, Any]) -> str:
    return str(prediction["short_answer"]).lower().strip()


def _score_type(group: list[dict[str, Any]], training: Mapping[str, str] | None) -> dict[str, Any]:
    """Scores the predictions of one question type in place and returns its row of the report."""
    labels = LabelSet((p["short_answer"], p.get("ground_truth") or "") for p in group)
    for p in group:
        p["keyword_correct"] = keyword_correct(p["short_answer"], p["predicted_answer"])
        p["word_correct"] = word_correct(p["short_answer"], p["predicted_answer"])
        p["label_correct"] = labels.stated(p["predicted_answer"]) == {_label(p)}
    truth = Counter(map(_label, group))
    confusion: dict[str, Counter[str]] = {label: Counter() for label, _ in truth.most_common()}
    predicted: Counter[str] = Counter()
    for p in group:
        answered = labels.predicted_label(p["predicted_answer"])
        predicted[answered] += 1
        confusion[_label(p)][answered if answered in truth else OTHER] += 1
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


def by_template(
    predictions: Sequence[dict[str, Any]], trained: Collection[tuple[str, str]], clusters: Sequence[int] | None = None
) -> dict[str, dict[str, Any]]:
    """{"in": accuracies of predictions with wordings of the training, "out": accuracies of those with other wordings}.

    `trained` has the training's (question type, wording). A prediction without a question is in neither. A side without
    predictions has only `samples` 0.
    """
    sides: list[str | None] = []
    for p in predictions:
        known = (p["question_type"], wording_of(p["question"])) in trained if p.get("question") else None
        sides.append(None if known is None else "in" if known else "out")
    return by_group(predictions, sides, ("in", "out"), clusters)


def by_group(
    predictions: Sequence[dict[str, Any]],
    group_of: Sequence[str | None],
    names: Sequence[str],
    clusters: Sequence[int] | None = None,
) -> dict[str, dict[str, Any]]:
    """{name: accuracies of the scored predictions in the group `name`}.

    `group_of` has each prediction's group or None. A group without predictions has only `samples` 0.
    """
    report: dict[str, dict[str, Any]] = {}
    for side in names:
        indices = [index for index, group in enumerate(group_of) if group == side]
        group = [predictions[i] for i in indices]
        report[side] = {"samples": len(group)}
        if group:
            inside = [clusters[i] for i in indices] if clusters is not None else None
            report[side] |= _accuracies(group, None)
            report[side] |= _intervals(group, inside)
    return report


def read_predictions(path: str | Path) -> list[dict[str, Any]]:
    """The predictions of a JSONL file; blank lines are skipped.

    Each line needs `question_type`, `short_answer` and `predicted_answer`. Labels and answers that are numbers become
    text. Other known fields must have their type. Raises UsageError with file, line and field.
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
