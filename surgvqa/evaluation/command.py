"""`surgvqa evaluate`: answers every sample and scores the answers by question type, or scores an existing file.

Accuracies are shares, 0..1, defined in score.py. Light to import; answering is in answers.py and generate.py.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from surgvqa.config.options import EvaluateOptions
from surgvqa.config.settings import require_bounds
from surgvqa.data.boxes import Boxes
from surgvqa.data.clusters import clusters_of
from surgvqa.data.lookup import check_samples
from surgvqa.data.samples import Sample, majority_labels, read_samples
from surgvqa.data.visibility import VERDICTS, visibility
from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.evaluation.interval import samples_of
from surgvqa.evaluation.model_folders import require_model, require_whisper, required
from surgvqa.evaluation.score import by_group, by_template, read_predictions, score
from surgvqa.evaluation.sources import PREDICTIONS, SCORES
from surgvqa.evaluation.text_scores import EXTRA, PACKAGES, text_scores
from surgvqa.files import write_json_atomic, write_synced
from surgvqa.machine.packages import require_installed
from surgvqa.outcome import Outcome
from surgvqa.runs.events import finite
from surgvqa.runs.folder import Run
from surgvqa.untrusted import json_line

FIGURES = ("keyword_accuracy", "word_accuracy", "label_accuracy", "majority_accuracy")


def check(options: EvaluateOptions) -> None:
    """Raises UsageError for what would stop the run later: options, checkpoint, samples, frames, spoken questions."""
    if options.output_file and not Path(options.output_file).absolute().parent.is_dir():
        raise UsageError(f"output_file {options.output_file}: no such folder to write it to")
    if options.text_scores:
        require_installed("--text_scores", PACKAGES, EXTRA)
    if options.boxes:
        if not options.eval_data_path:
            raise UsageError("--boxes: needs the samples' frames; name --eval_data_path as well")
        Boxes(options.boxes)
    if options.predictions:
        if options.resume:
            raise UsageError(
                "--resume continues a model's answers, and --predictions has all of them already: use only one"
            )
        read_predictions(options.predictions)
        return
    spoken = options.input_mode != "text_only"
    needed = ("checkpoint", "eval_data_path", "frames_dir", *(("audio_dir",) if spoken or options.asr else ()))
    given = {name: getattr(options, name) for name in needed} | {
        "audio_dir": options.eval_audio_dir or options.audio_dir
    }
    missing = [f"--{name}" for name in needed if not given[name]]
    if missing:
        raise UsageError(f"missing {', '.join(missing)}; or --predictions FILE scores an existing file")
    require_bounds(options)
    require_model(options)
    audio_dir = given["audio_dir"] if spoken or options.asr else None
    check_samples(required(options, "eval_data_path"), required(options, "frames_dir"), audio_dir)
    if options.asr and spoken:
        raise UsageError(f"asr: asks in writing, so input_mode must be text_only, but is {options.input_mode}")
    if options.asr:
        require_whisper(options.asr)


def run(options: EvaluateOptions, run: Run) -> Outcome:
    """Returns the report. With a model's answers, also writes predictions.jsonl and report.json into the run folder."""
    began = time.monotonic()
    if options.predictions:
        run.phase("score", str(options.predictions))
        predictions = read_predictions(options.predictions)
        report = _scored(predictions, options)
        data = {**report, "predictions": str(options.predictions), "seconds": time.monotonic() - began}
    else:
        from surgvqa.evaluation.answers import find_answers
        from surgvqa.evaluation.known import PARTIAL

        samples, answers, facts = find_answers(options, run)
        predictions = [prediction_of(sample, *answer) for sample, answer in zip(samples, answers)]
        for prediction, text in zip(predictions, facts.pop("recognised", [])):
            prediction["recognised"] = text
        report = _scored(predictions, options)
        file = run.folder / PREDICTIONS
        write_lines(file, predictions)
        data = {"run": run.id, **report, **facts, "predictions": str(file), "seconds": time.monotonic() - began}
        write_json_atomic(run.folder / SCORES, data)
        (run.folder / PARTIAL).unlink(missing_ok=True)
    if options.output_file:
        write_lines(Path(options.output_file), predictions)
    for text in report["warnings"]:
        run.warning(text)
    return Outcome(data, show=lambda console: draw(console, report))


def _scored(predictions: list[dict[str, Any]], options: EvaluateOptions) -> dict[str, Any]:
    """Scores predictions in place and returns the report, clustered if the samples' frames are known."""
    clusters, training, trained, answered, warnings = None, None, [], [], []
    if options.eval_data_path:
        samples = read_samples(options.eval_data_path)
        numbers = clusters_of(samples)
        cluster_of = {(sample.file, sample.line): number for sample, number in zip(samples, numbers)}
        try:
            answered = samples_of(predictions, samples, options.eval_data_path)
            clusters = [cluster_of[sample.file, sample.line] for sample in answered]
        except UsageError as error:
            warnings.append(f"the intervals are not clustered: {error}")
            if options.boxes:
                warnings.append("boxes: not used, since the predictions' frames are not known")
    if options.train_data_path:
        trained = read_samples(options.train_data_path)
        training = {kind: label for kind, (label, _) in majority_labels(trained).items()}
    report = score(predictions, clusters=clusters, training=training)
    if options.train_data_path:
        wordings = {(sample.question_type, sample.wording) for sample in trained}
        report["by_template"] = by_template(predictions, wordings, clusters)
    if options.boxes and answered:
        seen = visibility(answered, Boxes(options.boxes), options.drift)
        verdicts = [one.verdict if one else None for one in seen]
        report["visibility"] = by_group(predictions, verdicts, VERDICTS, clusters)
    if options.text_scores:
        answers = [(p["predicted_answer"], p.get("ground_truth")) for p in predictions]
        report["text_scores"] = text_scores(*zip(*answers))
    for prediction in predictions:  # as in the author's files, where both are the keyword score
        prediction["exact_match"] = prediction["correct"] = int(prediction["keyword_correct"])
    return report | {"warnings": warnings}


def draw(console: Any, report: dict[str, Any]) -> None:
    """Draws the report as a table, with a bar of the label accuracy if the terminal is wide enough."""
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
    for text in _summary_lines(report):
        console.print(Text(text))
    console.print(
        "accuracy in %. keyword: the label occurs in the answer, even inside a word; word: between word boundaries; "
        "label: the answer states it as a word, and no other label; majority: always the type's most frequent label; "
        "informative: types with more than one label in this file",
        style="dim",
    )


def _summary_lines(report: dict[str, Any]) -> list[str]:
    """Lines below the table: the interval, the training majority, templates, boxes and text scores."""

    def percent(*shares: float) -> str:
        return " to ".join(f"{100 * share:.1f}" for share in shares)

    clusters = report["clusters"]
    if clusters is None:
        basis = "as if the samples were independent (with --eval_data_path, clustered)"
    else:
        basis = f"{report['samples']:,} samples in {clusters:,} clusters"
    texts = [f"keyword accuracy, 95 % interval: {percent(*report['keyword_interval'])} %; {basis}"]
    if "train_majority_accuracy" in report:
        inside = report["informative"]["train_majority_accuracy"]
        texts.append(
            f"always the training's most frequent label: {percent(report['train_majority_accuracy'])} %"
            f" (informative types: {percent(inside)} %)"
        )
    sides = report.get("by_template", {})
    if sides and all(side["samples"] for side in sides.values()):
        parts = [
            f"{name} {side['samples']:,} samples, keyword {percent(side['keyword_accuracy'])} %, label "
            f"{percent(side['label_accuracy'])} %"
            for name, side in (("in template", sides["in"]), ("out of template", sides["out"]))
        ]
        texts.append(f"questions in the training's wording and in others: {'; '.join(parts)}")
    if seen := report.get("visibility"):
        parts = [
            f"{name.replace('_', ' ')} {group['samples']:,} samples"
            + (f", label {percent(group['label_accuracy'])} %" if group["samples"] else "")
            for name, group in seen.items()
        ]
        texts.append(f"labels of the lesion's place and motion, by what the boxes show: {'; '.join(parts)}")
    if text := report.get("text_scores"):
        texts.append(
            f"sentences ({text['samples']:,} with a reference): BLEU-4 {percent(text['bleu_4'])}, 4-gram precision "
            f"{percent(text['precision_4gram'])}, ROUGE-L {percent(text['rouge_l'])}, METEOR without synonyms "
            f"{percent(text['meteor'])}"
        )
    return texts


def prediction_of(sample: Sample, answer: str, milliseconds: float | None = None) -> dict[str, Any]:
    """A line of predictions.jsonl without scores."""
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


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes a JSONL file atomically. Raises SurgvqaError when it cannot be written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_synced(temporary, b"".join(json_line(finite(row)) for row in rows))
        os.replace(temporary, path)
    except OSError as error:
        raise SurgvqaError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)
