"""`surgvqa evaluate`: an answer to every sample, scored by question type; or the scores of an existing file.

Accuracies are shares, 0..1; score.py says what counts. Light to import; answering is in generate.py.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from surgvqa.config.options import EvaluateOptions
from surgvqa.config.settings import require_bounds
from surgvqa.data.lookup import check_samples
from surgvqa.data.samples import Sample
from surgvqa.errors import UsageError
from surgvqa.evaluation.model_folders import model_folders, required
from surgvqa.evaluation.score import read_predictions, score
from surgvqa.files import write_json_atomic
from surgvqa.outcome import Outcome
from surgvqa.runs.folder import Run
from surgvqa.untrusted import json_line


def check(options: EvaluateOptions) -> None:
    """UsageError for what would stop the run later: options, checkpoint, samples, frames, spoken questions."""
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
    """Writes predictions.jsonl and report.json into the run folder; the report is the result."""
    began = time.monotonic()
    facts: dict[str, Any] = {}
    if options.predictions:
        run.phase("score", str(options.predictions))
        predictions = read_predictions(options.predictions)
    else:
        from surgvqa.evaluation.generate import generate_answers

        samples, answers, facts = generate_answers(options, run)
        predictions = [_prediction(sample, answer) for sample, answer in zip(samples, answers)]
    report = score(predictions)
    _write_lines(run.folder / "predictions.jsonl", predictions)
    data = {
        "run": run.id,
        **report,
        **facts,
        "predictions": str(run.folder / "predictions.jsonl"),
        "seconds": time.monotonic() - began,
    }
    write_json_atomic(run.folder / "report.json", data)
    return Outcome(data, show=lambda console: draw(console, report))


def draw(console: Any, report: dict[str, Any]) -> None:
    """The report as a table; with a bar of the label accuracy where the terminal is wide enough."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from surgvqa.terminal.drawing import bar

    wide = console.width >= 100
    table = Table(box=box.SIMPLE, show_edge=False)
    table.add_column("question type", no_wrap=True)
    for heading in ("n", "keyword", "label"):
        table.add_column(heading, justify="right")
    if wide:
        table.add_column(no_wrap=True)
    table.add_column("majority", justify="right")
    table.add_column("collapsed")

    def add(name: Text, n: int, row: dict[str, Any], note: str) -> None:
        figures = [f"{100 * row[key]:.1f}" for key in ("keyword_accuracy", "label_accuracy", "majority_accuracy")]
        bars = [bar(row["label_accuracy"], width=16, alarm=False)] if wide else []
        table.add_row(name, str(n), *figures[:2], *bars, figures[2], Text(note, "yellow"))

    for name, row in report["by_type"].items():
        add(Text(name), row["n"], row, row["collapsed"])
    table.add_section()
    add(Text("all", "bold"), report["samples"], report, "")
    console.print(table)
    console.print(
        "accuracy in %. keyword: the label occurs in the answer, even inside a word; label: it is stated as a word, "
        "and no other label; majority: always the type's most frequent label",
        style="dim",
    )


def _prediction(sample: Sample, answer: str) -> dict[str, Any]:
    """One line of predictions.jsonl, without the scores."""
    return {
        "question_id": sample.id,
        "video_id": sample.video_id,
        "question_type": sample.question_type,
        "question": sample.question,
        "ground_truth": sample.answer,
        "short_answer": sample.short_answer,
        "predicted_answer": answer,
    }


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(b"".join(map(json_line, rows)))
    temporary.replace(path)
