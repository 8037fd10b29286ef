"""What the page shows: samples joined with the answers of each model, by video, id and wording, never by id alone."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgvqa.config.workspace import Workspace
from surgvqa.data.samples import Sample, read_samples
from surgvqa.errors import UsageError
from surgvqa.evaluation.score import read_predictions, score
from surgvqa.files import read_json
from surgvqa.runs.history import find_run

PREDICTIONS, SCORES = "predictions.jsonl", "report.json"


@dataclass
class Model:
    """One file of predictions, scored."""

    name: str
    file: Path
    predictions: list[dict[str, Any]]
    scores: dict[str, Any]
    """What `evaluate` reports: accuracies are shares, 0..1."""


@dataclass
class Answer:
    """What one model said to one sample."""

    text: str
    marks: dict[str, bool]
    """{"keyword": right?, "label": right?, …}: every `…_correct` of the prediction."""
    milliseconds: float | None = None


@dataclass
class Entry:
    """One row of the page: a sample, or a prediction whose sample is not at hand."""

    video: str
    """Empty where a prediction does not say it."""
    id: str
    type: str
    question: str
    label: str
    reference: str
    """The reference answer, a sentence."""
    sample: Sample | None = None
    answers: list[Answer | None] = field(default_factory=list)
    """One for each model; None where it was not asked."""

    @property
    def wording(self) -> str:
        """The question without case and extra spaces."""
        return " ".join(self.question.split()).casefold()


@dataclass
class Inputs:
    """The files and runs that were named, read."""

    models: list[Model] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    defaults: dict[str, str] = field(default_factory=dict)
    """Options of the first run that has them: eval_data_path, frames_dir, audio_dir, eval_audio_dir."""


def read_inputs(names: Iterable[str], workspace: Workspace) -> Inputs:
    """Reads runs (by id, name or folder), prediction files and sample files, each recognised by what it holds.

    Raises UsageError that names the file for what cannot be read or found.
    """
    inputs = Inputs()
    for name in names:
        path = Path(os.path.expanduser(name))
        if path.is_file() and not _holds_predictions(path):
            inputs.samples += read_samples(path)
            continue
        folder = None if path.is_file() else _run_folder(path, name, workspace)
        file = path if folder is None else folder / PREDICTIONS
        if not file.is_file():
            raise UsageError(f"{name}: no {PREDICTIONS} in {folder}, expected a run of `surgvqa evaluate`")
        predictions = read_predictions(file)
        scores = score(predictions)
        if folder is not None:
            info = read_json(folder / "run.json") if (folder / "run.json").is_file() else {}
            if (folder / SCORES).is_file():
                scores = {**scores, **read_json(folder / SCORES)}
            for option, value in _options(info).items():
                inputs.defaults.setdefault(option, value)
        label = path.stem if folder is None else folder.name
        inputs.models.append(Model(label, file, predictions, scores))
    _tell_apart(inputs.models)
    return inputs


def _holds_predictions(path: Path) -> bool:
    """Whether the first line that is JSON has an answer in it; a file of samples has frames instead."""
    try:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            line = next((line for line in file if line.strip()), "")
        first = json.loads(line)
    except (OSError, ValueError, RecursionError):
        return True  # whoever reads predictions says what is wrong with it
    return not (isinstance(first, dict) and "frames" in first and "predicted_answer" not in first)


def _run_folder(path: Path, name: str, workspace: Workspace) -> Path:
    if (path / PREDICTIONS).is_file():
        return path.resolve()
    if os.sep in name or path.suffix == ".jsonl":
        raise UsageError(f"{name}: no such file, expected a run, a file of predictions or a file of samples")
    return find_run(name, [workspace.runs_dir], "evaluate")


def _options(info: Mapping[str, Any]) -> dict[str, str]:
    options = info.get("options")
    found = {}
    for name in ("eval_data_path", "frames_dir", "audio_dir", "eval_audio_dir"):
        entry = options.get(name) if isinstance(options, dict) else None
        value = entry.get("value") if isinstance(entry, dict) else entry
        if isinstance(value, str) and value:
            found[name] = value
    return found


def _tell_apart(models: list[Model]) -> None:
    """Models of one name get their folder before it, and a number if that is the same as well."""
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
    """One entry for each sample, then for each question that no sample has; and what could not be joined, in words.

    A prediction belongs to the sample of its video and id, or, without a video, to the only sample of its id. Where
    both have a question, the wording must be the same: ids repeat over videos and over wordings.
    """
    entries = [_of_sample(sample) for sample in samples]
    known: dict[tuple[str, ...], list[Entry]] = defaultdict(list)
    for entry in entries:
        _register(known, entry)
    notes = []
    for number, model in enumerate(models):
        unknown = doubled = 0
        for prediction in model.predictions:
            wanted = _of_prediction(prediction)
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
            notes.append(f"{model.name}: {unknown} of {len(model.predictions)} predictions fit no sample, or several")
        if doubled:
            notes.append(f"{model.name}: {doubled} predictions repeat an earlier one of the same sample; left out")
    for entry in entries:
        entry.answers += [None] * (len(models) - len(entry.answers))
    return entries, notes


def _register(known: dict[tuple[str, ...], list[Entry]], entry: Entry) -> None:
    known["video", entry.video, entry.id].append(entry)
    known["id", entry.id].append(entry)


def _candidates(known: Mapping[tuple[str, ...], list[Entry]], wanted: Entry) -> list[Entry]:
    """The entries that a prediction may belong to; the same sample in two files counts once."""
    key = ("video", wanted.video, wanted.id) if wanted.video else ("id", wanted.id)
    found = known.get(key, []) if wanted.id else []
    if wanted.question:
        found = [entry for entry in found if not entry.question or entry.wording == wanted.wording]
    return found


def _of_sample(sample: Sample) -> Entry:
    return Entry(
        sample.video_id, sample.id, sample.question_type, sample.question, sample.short_answer, sample.answer, sample
    )


def _of_prediction(prediction: Mapping[str, Any]) -> Entry:
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
