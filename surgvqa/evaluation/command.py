"""`surgvqa evaluate`: an answer to every sample, scored by question type; or the scores of an existing file.

Accuracies are shares, 0..1; score.py says what counts. Light to import; answering is in generate.py.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from surgvqa.config.options import EvaluateOptions
from surgvqa.config.settings import require_bounds
from surgvqa.data.clusters import clusters_of
from surgvqa.data.lookup import check_samples
from surgvqa.data.samples import Sample, majority_labels, read_samples
from surgvqa.errors import UsageError
from surgvqa.evaluation.interval import samples_of
from surgvqa.evaluation.model_folders import model_folders, required
from surgvqa.evaluation.score import read_predictions, score
from surgvqa.files import write_json_atomic
from surgvqa.outcome import Outcome
from surgvqa.runs.folder import Run
from surgvqa.untrusted import json_line

FIGURES = ("keyword_accuracy", "word_accuracy", "label_accuracy", "majority_accuracy")


def check(options: EvaluateOptions) -> None:
    """UsageError for what would stop the run later: options, checkpoint, samples, frames, spoken questions."""
    if options.output_file and not Path(options.output_file).absolute().parent.is_dir():
        raise UsageError(f"output_file {options.output_file}: no such folder to write it to")
    if options.predictions:
        read_predictions(options.predictions)
        return
    needed = ("checkpoint", "eval_data_path", "frames_dir", "audio_dir")
    given = {name: getattr(options, name) for name in needed} | {
        "audio_dir": options.eval_audio_dir or options.audio_dir
    }
    missing = [f"--{name}" for name in needed if not given[name]]
    if missing:
        raise UsageError(f"missing {', '.join(missing)}; or --predictions FILE scores an existing file")
    require_bounds(options)
    model_folders(options)
    check_samples(required(options, "eval_data_path"), required(options, "frames_dir"), given["audio_dir"])


def run(options: EvaluateOptions, run: Run) -> Outcome:
    """The report is the result. Of answers by a model, predictions.jsonl and report.json go into the run folder."""
    began = time.monotonic()
    if options.predictions:
        run.phase("score", str(options.predictions))
        predictions = read_predictions(options.predictions)
        report = _scored(predictions, options)
        data = {**report, "predictions": str(options.predictions), "seconds": time.monotonic() - began}
    else:
        from surgvqa.evaluation.generate import generate_answers

        samples, answers, facts = generate_answers(options, run)
        predictions = [_prediction(sample, *answer) for sample, answer in zip(samples, answers)]
        report = _scored(predictions, options)
        file = run.folder / "predictions.jsonl"
        _write_lines(file, predictions)
        data = {"run": run.id, **report, **facts, "predictions": str(file), "seconds": time.monotonic() - began}
        write_json_atomic(run.folder / "report.json", data)
    if options.output_file:
        _write_lines(Path(options.output_file), predictions)
    for text in report["warnings"]:
        run.warning(text)
    return Outcome(data, show=lambda console: draw(console, report))


def _scored(predictions: list[dict[str, Any]], options: EvaluateOptions) -> dict[str, Any]:
    """The report on predictions, which gain their scores; clustered where the samples' frames are known."""
    clusters, training, warnings = None, None, []
    if options.eval_data_path:
        samples = read_samples(options.eval_data_path)
        numbers = clusters_of(samples)
        cluster_of = {(sample.file, sample.line): number for sample, number in zip(samples, numbers)}
        try:
            answered = samples_of(predictions, samples, options.eval_data_path)
            clusters = [cluster_of[sample.file, sample.line] for sample in answered]
        except UsageError as error:
            warnings.append(f"the intervals are not clustered: {error}")
    if options.train_data_path:
        majority = majority_labels(read_samples(options.train_data_path))
        training = {kind: label for kind, (label, _) in majority.items()}
    report = score(predictions, clusters=clusters, training=training)
    for prediction in predictions:  # as the author's files have them: both are the keyword score
        prediction.setdefault("exact_match", int(prediction["keyword_correct"]))
        prediction.setdefault("correct", int(prediction["keyword_correct"]))
    return report | {"warnings": warnings}


def draw(console: Any, report: dict[str, Any]) -> None:
    """The report as a table; with a bar of the label accuracy where the terminal is wide enough."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from surgvqa.terminal.drawing import bar

    wide = console.width >= 100
    table = Table(box=box.SIMPLE, show_edge=False)
    table.add_column("question type", no_wrap=True)
    shown = FIGURES if wide else tuple(name for name in FIGURES if name != "word_accuracy")
    for heading in ("n", *(name.removesuffix("_accuracy") for name in shown[:-1])):
        table.add_column(heading, justify="right")
    if wide:
        table.add_column(no_wrap=True)
    table.add_column("majority", justify="right")
    table.add_column("collapsed")

    def add(name: Text, n: int, row: dict[str, Any], note: str) -> None:
        figures = [f"{100 * row[key]:.1f}" for key in shown]
        bars = [bar(row["label_accuracy"], width=16, alarm=False)] if wide else []
        table.add_row(name, str(n), *figures[:-1], *bars, figures[-1], Text(note, "yellow"))

    for name, row in report["by_type"].items():
        add(Text(name), row["n"], row, row["collapsed"])
    table.add_section()
    add(Text("all", "bold"), report["samples"], report, "")
    informative = report["informative"]
    if 0 < informative["samples"] < report["samples"]:
        add(Text("informative types"), informative["samples"], informative, "")
    console.print(table)
    for text in _in_words(report):
        console.print(Text(text))
    console.print(
        "accuracy in %. keyword: the label occurs in the answer, even inside a word; word: between word boundaries; "
        "label: it is stated as a word, and no other label; majority: always the type's most frequent label; "
        "informative: types with more than one label in this file",
        style="dim",
    )


def _in_words(report: dict[str, Any]) -> list[str]:
    """The interval, and the baseline of one who has seen the training alone."""

    def percent(*shares: float) -> str:
        return " to ".join(f"{100 * share:.1f}" for share in shares)

    clusters = report["clusters"]
    if clusters is None:
        basis = "as if the samples were independent (--eval_data_path tells which are not)"
    else:
        basis = f"{report['samples']:,} samples in {clusters:,} clusters"
    texts = [f"keyword accuracy, 95 % interval: {percent(*report['keyword_interval'])} %; {basis}"]
    if "train_majority_accuracy" in report:
        inside = report["informative"]["train_majority_accuracy"]
        texts.append(
            f"always the training's most frequent label: {percent(report['train_majority_accuracy'])} %"
            f" (informative types: {percent(inside)} %)"
        )
    return texts


def _prediction(sample: Sample, answer: str, milliseconds: float) -> dict[str, Any]:
    """One line of predictions.jsonl, without the scores."""
    return {
        "question_id": sample.id,
        "video_id": sample.video_id,
        "question_type": sample.question_type,
        "question": sample.question,
        "ground_truth": sample.answer,
        "short_answer": sample.short_answer,
        "predicted_answer": answer,
        "inference_time_ms": milliseconds,
    }


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(b"".join(map(json_line, rows)))
    temporary.replace(path)
