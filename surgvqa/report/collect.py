"""Joins samples with the answers of each model, by video, id and wording, never by id alone."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgvqa.config.workspace import Workspace
from surgvqa.data.clusters import clusters_of
from surgvqa.data.samples import Sample, read_samples
from surgvqa.errors import UsageError
from surgvqa.evaluation.compare import compare, pair
from surgvqa.evaluation.interval import samples_of
from surgvqa.evaluation.score import read_predictions, score
from surgvqa.evaluation.sources import SCORES, find_source
from surgvqa.files import read_json


@dataclass
class Model:
    """One file of predictions, scored."""

    name: str
    file: Path
    predictions: list[dict[str, Any]]
    scores: dict[str, Any]
    """The report of `evaluate`; accuracies are shares, 0..1."""
    clusters: list[int] | None = None
    """The cluster of each prediction's sample; None if the samples are unknown."""


@dataclass
class Answer:
    """One model's answer to one sample."""

    text: str
    marks: dict[str, bool]
    """{"keyword": bool, "label": bool, …}: every `…_correct` of the prediction."""
    milliseconds: float | None = None


@dataclass
class Entry:
    """One row of the page: a sample, or a prediction whose sample is unknown."""

    video: str
    """Empty if a prediction does not name it."""
    id: str
    type: str
    question: str
    label: str
    reference: str
    """The reference sentence."""
    sample: Sample | None = None
    answers: list[Answer | None] = field(default_factory=list)
    """One for each model; None if it did not answer this sample."""

    @property
    def wording(self) -> str:
        """The question without case and extra spaces."""
        return " ".join(self.question.split()).casefold()


@dataclass
class Inputs:
    """The contents of the given files and runs."""

    models: list[Model] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    defaults: dict[str, str] = field(default_factory=dict)
    """Options of the first run that has them: eval_data_path, frames_dir, audio_dir, eval_audio_dir."""


def read_inputs(names: Iterable[str], workspace: Workspace) -> Inputs:
    """Reads runs (by id, name or folder), prediction files and sample files. Files are recognised by their content.

    Raises UsageError, which names the file, for one that is missing or cannot be read.
    """
    inputs = Inputs()
    for name in names:
        path = Path(os.path.expanduser(name))
        if path.is_file() and not _holds_predictions(path):
            inputs.samples += read_samples(path)
            continue
        source = find_source(name, workspace)
        predictions = read_predictions(source.file)
        scores = score(predictions)
        if source.run and (source.run / SCORES).is_file():
            scores = {**scores, **read_json(source.run / SCORES)}
        for option, value in source.options.items():
            inputs.defaults.setdefault(option, value)
        inputs.models.append(Model(source.name, source.file, predictions, scores))
    _make_names_unique(inputs.models)
    return inputs


def find_clusters(models: Iterable[Model], samples: list[Sample]) -> list[str]:
    """Adds clusters and clustered intervals to the models. Returns notes on why some have none."""
    cluster_of = {(s.file, s.line): number for s, number in zip(samples, clusters_of(samples))}
    notes = []
    for model in models:
        try:
            answered = samples_of(model.predictions, samples, "the given samples")
        except UsageError as error:
            if model.scores.get("clusters") is None:
                notes.append(f"{model.name}: its intervals treat the samples as independent: {error}")
            continue
        model.clusters = [cluster_of[s.file, s.line] for s in answered]
        if model.scores.get("clusters") is None:
            clustered = score(model.predictions, clusters=model.clusters)
            model.scores |= {key: value for key, value in clustered.items() if "interval" in key or key == "clusters"}
            intervals = {k: v for k, v in clustered["informative"].items() if k.endswith("_interval")}
            known = model.scores["informative"]  # from report.json, which is not trusted
            model.scores["informative"] = {**(known if isinstance(known, dict) else {}), **intervals}
    return notes


def compare_all(models: list[Model]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """({model: its comparison with the first (evaluation.compare)}, notes on why some have none)."""
    found, notes = {}, []
    for model in models[1:]:
        first = models[0]
        try:
            later = pair(first.predictions, model.predictions, first.name, model.name)
        except UsageError as error:
            notes.append(f"{model.name} is not compared with {first.name}: {error}")
            continue
        found[model.name] = compare(first.predictions, later, clusters=first.clusters)
    return found, notes


def _holds_predictions(path: Path) -> bool:
    """Whether the first valid line has an answer; a file of samples has frames instead."""
    try:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            line = next((line for line in file if line.strip()), "")
        first = json.loads(line)
    except (OSError, ValueError, RecursionError):
        return True  # reading the predictions then reports what is wrong
    return not (isinstance(first, dict) and "frames" in first and "predicted_answer" not in first)


def _make_names_unique(models: list[Model]) -> None:
    """Makes the models' names unique: adds the folder, and a number if that is the same too."""
    twice = {name for name, count in Counter(model.name for model in models).items() if count > 1}
    for model in models:
        if model.name in twice:
            model.name = f"{model.file.resolve().parent.name}/{model.name}"
    seen: Counter[str] = Counter()
    for model in models:
        seen[model.name] += 1
        if seen[model.name] > 1:
            model.name = f"{model.name} ({seen[model.name]})"


def join(samples: list[Sample], models: list[Model]) -> tuple[list[Entry], list[str]]:
    """(an entry for each sample, then one for each question without a sample; notes on what could not be joined).

    A prediction belongs to the sample with its video and id or, without a video, to the only sample with its id. If
    both have a question, the wording must be the same, because ids repeat over videos and over wordings.
    """
    entries = [_entry_of_sample(sample) for sample in samples]
    known: dict[tuple[str, ...], list[Entry]] = defaultdict(list)
    for entry in entries:
        _register(known, entry)
    notes = []
    for number, model in enumerate(models):
        unknown = doubled = 0
        for prediction in model.predictions:
            wanted = _entry_of_prediction(prediction)
            found = _candidates(known, wanted)
            if len(found) != 1:
                unknown += bool(samples)
                entries.append(wanted)
                _register(known, wanted)
                found = [wanted]
            answers = found[0].answers
            answers += [None] * (number + 1 - len(answers))
            if answers[number] is not None:
                doubled += 1
                continue
            answers[number] = _answer(prediction)
        if unknown:
            notes.append(f"{model.name}: {unknown} of {len(model.predictions)} predictions match no sample, or several")
        if doubled:
            notes.append(f"{model.name}: {doubled} predictions repeat an earlier one of the same sample; left out")
    for entry in entries:
        entry.answers += [None] * (len(models) - len(entry.answers))
    return entries, notes


def _register(known: dict[tuple[str, ...], list[Entry]], entry: Entry) -> None:
    known["video", entry.video, entry.id].append(entry)
    known["id", entry.id].append(entry)


def _candidates(known: Mapping[tuple[str, ...], list[Entry]], wanted: Entry) -> list[Entry]:
    """The entries that a prediction may belong to. The same sample in two files counts once."""
    key = ("video", wanted.video, wanted.id) if wanted.video else ("id", wanted.id)
    found = known.get(key, []) if wanted.id else []
    if wanted.question:
        found = [entry for entry in found if not entry.question or entry.wording == wanted.wording]
    return found


def _entry_of_sample(sample: Sample) -> Entry:
    return Entry(
        sample.video_id, sample.id, sample.question_type, sample.question, sample.short_answer, sample.answer, sample
    )


def _entry_of_prediction(prediction: Mapping[str, Any]) -> Entry:
    def text(*names: str) -> str:
        values = (prediction.get(name) for name in names)
        return next((str(value) for value in values if isinstance(value, (str, int)) and str(value)), "")

    return Entry(
        text("video_id"),
        text("question_id", "id"),
        text("question_type"),
        text("question"),
        text("short_answer"),
        text("ground_truth"),
    )


def _answer(prediction: Mapping[str, Any]) -> Answer:
    marks = {
        name.removesuffix("_correct"): bool(value)
        for name, value in prediction.items()
        if name.endswith("_correct") and isinstance(value, (bool, int))
    }
    took = prediction.get("inference_time_ms")
    return Answer(
        str(prediction.get("predicted_answer", "")),
        marks,
        float(took) if isinstance(took, (int, float)) and not isinstance(took, bool) else None,
    )
