"""`surgvqa compare`: compares models sample by sample on the same samples. Light; docs/scores.md defines its figures.

Each further file is compared with the first. Differences are shares, -1..1, positive if the later file is better.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from surgvqa.config.options import CompareOptions
from surgvqa.config.workspace import Workspace
from surgvqa.data.clusters import clusters_of
from surgvqa.data.samples import read_samples, wording_of
from surgvqa.errors import UsageError
from surgvqa.evaluation.interval import paired_interval, samples_of, standard_error
from surgvqa.evaluation.paired import clusters_needed, detectable, mcnemar
from surgvqa.evaluation.score import METRICS, read_predictions, score
from surgvqa.evaluation.sources import Source, find_source
from surgvqa.outcome import Outcome
from surgvqa.untrusted import one_line

MAX_NAMED = 3
"""Maximum number of samples that an error names."""

Prediction = dict[str, Any]


def check(options: CompareOptions) -> None:
    """Raises UsageError unless there are two files to compare."""
    if len(options.files) < 2:
        raise UsageError("compare takes two or more files of predictions (or runs) of the same samples")


def run(options: CompareOptions, workspace: Workspace) -> Outcome:
    """Reads, pairs, scores and compares. Writes nothing."""
    sources = [find_source(name, workspace) for name in options.files]
    first, *others = [read_predictions(source.file) for source in sources]
    paired = [first]
    for source, predictions in zip(sources[1:], others):
        paired.append(pair(first, predictions, str(sources[0].file), str(source.file), options.reworded))
    reports = [score(predictions) for predictions in paired]
    clusters, warnings = _clusters(first, sources, options, workspace)
    compared = [compare(first, later, options.metric, clusters, options.detect) for later in paired[1:]]
    comparisons = [{"file": str(source.file), "name": source.name, **row} for source, row in zip(sources[1:], compared)]
    data = {
        "files": [str(source.file) for source in sources],
        "metric": options.metric,
        "samples": len(first),
        "clusters": len(set(clusters)) if clusters is not None else None,
        "accuracies": [{m: report[f"{m}_accuracy"] for m in METRICS} for report in reports],
        **compared[0],
        "comparisons": comparisons,
        "warnings": warnings,
    }
    return Outcome(data, show=lambda console: draw(console, data, sources[0].name))


# --- pairing ----------------------------------------------------------------------------------------------------------


def pair(
    first: Sequence[Prediction], second: Sequence[Prediction], name: str, other: str, reworded: bool = False
) -> list[Prediction]:
    """The predictions of `second` in the order of `first`, each for the same sample.

    Samples are identified by question type and those of video, id and question that every line of both files has; with
    `reworded`, by the label instead of the question. Raises UsageError, which names samples, when the files have
    different samples, or different labels for the same sample.
    """
    both = [*first, *second]
    has = [key for key in ("video_id", "question_id", "question") if all(p.get(key) for p in both)]
    if "question_id" not in has and ("question" not in has or reworded):
        what = "question_id" if reworded else "question_id and no question"
        raise UsageError(f"{name}, {other}: some lines have no {what}, so samples cannot be identified")

    def key_of(prediction: Prediction) -> tuple[str, ...]:
        values = [str(prediction[key]) for key in has if key != "question"]
        if reworded:
            values.append(_label(prediction))
        elif "question" in has:
            values.append(wording_of(prediction["question"]))
        return prediction["question_type"], *values

    waiting: dict[tuple[str, ...], list[Prediction]] = defaultdict(list)
    for prediction in reversed(second):
        waiting[key_of(prediction)].append(prediction)
    missing, found = [], []
    for prediction in first:
        fitting = waiting[key_of(prediction)]
        if fitting:
            found.append(fitting.pop())
        else:
            missing.append(prediction)
    surplus = [prediction for left in waiting.values() for prediction in reversed(left)][::-1]
    if missing or surplus:
        raise UsageError(_difference_message(missing, surplus, name, other))
    for mine, theirs in zip(first, found):
        if _label(mine) != _label(theirs):
            raise UsageError(
                f"{_sample_name(mine)}: the label is {mine['short_answer']!r} in {name} and "
                f"{theirs['short_answer']!r} in {other}, expected the same samples"
            )
    return found


def _difference_message(missing: Sequence[Prediction], surplus: Sequence[Prediction], name: str, other: str) -> str:
    parts = []
    for group, here, there in ((missing, name, other), (surplus, other, name)):
        if group:
            named = ", ".join(map(_sample_name, group[:MAX_NAMED])) + (", …" if len(group) > MAX_NAMED else "")
            parts.append(f"{len(group)} in {here} and not in {there} ({named})")
    ids = Counter(map(_identity, missing)) & Counter(map(_identity, surplus))
    hint = f"; {ids.total()} differ only in the question's wording: --reworded pairs them" if ids else ""
    return f"the files hold different samples: {'; '.join(parts)}{hint}"


def _identity(prediction: Prediction) -> tuple[str, ...]:
    return *(str(prediction.get(key) or "") for key in ("video_id", "question_id", "question_type")), _label(prediction)


def _sample_name(prediction: Prediction) -> str:
    parts = (str(prediction.get(key) or "") for key in ("video_id", "question_id"))
    return one_line(" ".join(part for part in parts if part) or str(prediction.get("question")))[:60]


def _label(prediction: Prediction) -> str:
    return str(prediction["short_answer"]).strip().lower()


def _clusters(
    predictions: Sequence[Prediction], sources: Sequence[Source], options: CompareOptions, workspace: Workspace
) -> tuple[list[int] | None, list[str]]:
    """(each sample's cluster, or None if the file of the samples is unknown; warnings)."""
    path: str | None = options.eval_data_path
    if path in (
        None,
        workspace.value("eval_data_path", "compare"),
    ):  # a run's own samples take precedence over surgvqa.toml's
        of_runs = (source.options["eval_data_path"] for source in sources if "eval_data_path" in source.options)
        here = next(of_runs, None)
        path = path if here is None else str(workspace.root / here)
    if not path:
        return None, ["the interval treats the samples as independent: give --eval_data_path for a clustered one"]
    samples = read_samples(path)
    cluster_of = {(s.file, s.line): number for s, number in zip(samples, clusters_of(samples))}
    try:
        return [cluster_of[s.file, s.line] for s in samples_of(predictions, samples, path)], []
    except UsageError as error:
        return None, [f"the interval is not clustered: {error}"]


# --- comparing --------------------------------------------------------------------------------------------------------


def compare(
    first: Sequence[Prediction],
    second: Sequence[Prediction],
    metric: str = "keyword",
    clusters: Sequence[int] | None = None,
    detect_points: float | None = None,
) -> dict[str, Any]:
    """Compares scored predictions in pairs: in total, by metric and by type, with the samples that flipped."""
    whole = _row(first, second, metric, clusters)
    types: dict[str, list[int]] = defaultdict(list)
    for index, prediction in enumerate(first):
        types[prediction["question_type"]].append(index)
    by_type = {}
    for kind, indices in sorted(types.items()):
        inside = [clusters[i] for i in indices] if clusters is not None else None
        row = _row([first[i] for i in indices], [second[i] for i in indices], metric, inside)
        by_type[kind] = {"n": len(indices), **row}
    error = standard_error(_differences(first, second, metric), clusters)
    count = len(set(clusters)) if clusters is not None else len(first)
    planning: dict[str, Any] = {"detectable": detectable(error) if error else None}
    if detect_points is not None:
        needed = clusters_needed(error, count, detect_points / 100) if error else None
        samples = round(needed * len(first) / count) if needed else None
        planning |= {"detect": detect_points / 100, "clusters_needed": needed, "samples_needed": samples}
    return {
        **whole,
        "flips": _flips(first, second, metric),
        "metrics": {name: _row(first, second, name, clusters) for name in METRICS},
        "by_type": by_type,
        **planning,
    }


def _differences(first: Sequence[Prediction], second: Sequence[Prediction], metric: str) -> list[int]:
    """Second minus first for each sample: -1, 0 or 1."""
    key = f"{metric}_correct"
    return [int(after[key]) - int(before[key]) for before, after in zip(first, second)]


def _row(
    first: Sequence[Prediction], second: Sequence[Prediction], metric: str, clusters: Sequence[int] | None
) -> dict[str, Any]:
    differences = _differences(first, second, metric)
    counts = Counter(differences)
    return {
        "before": sum(p[f"{metric}_correct"] for p in first) / len(first),
        "after": sum(p[f"{metric}_correct"] for p in second) / len(second),
        "difference": sum(differences) / len(differences),
        "interval": paired_interval(differences, clusters),
        "mcnemar_p": mcnemar(counts[1], counts[-1]),
        "gained": counts[1],
        "lost": counts[-1],
    }


def _flips(first: Sequence[Prediction], second: Sequence[Prediction], metric: str) -> list[dict[str, Any]]:
    """The samples that only one of the models answered correctly."""
    return [
        {
            **{key: before.get(key) for key in ("video_id", "question_id", "question_type", "question")},
            "short_answer": before["short_answer"],
            "gained": difference > 0,
            "before": before["predicted_answer"],
            "after": after["predicted_answer"],
        }
        for before, after, difference in zip(first, second, _differences(first, second, metric))
        if difference
    ]


# --- showing ----------------------------------------------------------------------------------------------------------

FLIPS_SHOWN = 12


def draw(console: Any, data: dict[str, Any], first: str) -> None:
    """Draws for each file compared with the first a table, the question types with flips, and the first flips."""
    for comparison in data["comparisons"]:
        _draw_one(console, data, comparison, first)
    for text in data["warnings"]:
        console.print(text, style="yellow")
    console.print(
        "points: percentage points and their 95 % interval, positive if the later file is better; p: exact "
        "McNemar, which assumes independent flips. Of many question types, one in twenty has p < 0.05 by chance.",
        style="dim",
    )


def _draw_one(console: Any, data: dict[str, Any], comparison: dict[str, Any], first: str) -> None:
    from rich import box
    from rich.table import Table

    from surgvqa.terminal.drawing import plain

    wide = console.width >= 100
    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in (*("n",) * wide, "before/after", "points", "flips", "p"):
        table.add_column(heading, justify="right", no_wrap=True)

    def add(name: str, n: int, row: dict[str, Any], bold: bool = False) -> None:
        low, high = (f"{100 * bound:.1f}" for bound in row["interval"])
        points = f"{100 * row['difference']:+.1f} ({low} to {high})"
        figures = (f"{100 * row['before']:.1f}  {100 * row['after']:.1f}", points)
        counts = (f"+{row['gained']} -{row['lost']}", _p_value(row["mcnemar_p"]))
        table.add_row(plain(name), *(str(n),) * wide, *figures, *counts, style="bold" if bold else "")

    for metric, row in comparison["metrics"].items():
        add(f"{metric} accuracy", data["samples"], row, bold=metric == data["metric"])
    table.add_section()
    flipped = {kind: row for kind, row in comparison["by_type"].items() if row["gained"] or row["lost"]}
    for kind, row in flipped.items():
        add(kind, row["n"], row)
    console.print(plain(f"{first} (before) and {comparison['name']} (after), {_sample_count(data)}"))
    console.print(table)
    same = len(comparison["by_type"]) - len(flipped)
    if same:
        console.print(f"{same} question types without a flip ({data['metric']})", style="dim")
    flips = comparison["flips"]
    for flip in flips[:FLIPS_SHOWN]:
        sign = "+" if flip["gained"] else "-"
        answers = f"{flip['before']!r} -> {flip['after']!r}"
        console.print(
            plain(f"  {sign} {_sample_name(flip)} ({flip['question_type']}: {flip['short_answer']}) {answers}")
        )
    if len(flips) > FLIPS_SHOWN:
        console.print(f"  and {len(flips) - FLIPS_SHOWN} more flips (--json lists them all)", style="dim")
    for text in _power_lines(data, comparison):
        console.print(text)


def _p_value(p: float) -> str:
    return f"{p:.2g}" if p >= 0.0001 else "<0.0001"


def _sample_count(data: dict[str, Any]) -> str:
    clusters = data["clusters"]
    return f"{data['samples']:,} samples" + (f" in {clusters:,} clusters" if clusters is not None else "")


def _power_lines(data: dict[str, Any], comparison: dict[str, Any]) -> list[str]:
    """Lines on the difference that these samples can detect, and how many samples the requested one needs."""
    if comparison["detectable"] is None:
        return ["no sample flipped, or there is only one cluster: the number of samples needed is unknown"]
    unit = "samples" if data["clusters"] is None else "clusters"
    texts = [
        f"with so many {unit}, four of five experiments detect a true difference of "
        f"{100 * comparison['detectable']:.1f} points"
    ]
    if "detect" in comparison:
        asked = f"a true difference of {100 * comparison['detect']:g} points needs {comparison['clusters_needed']:,}"
        about = "" if data["clusters"] is None else f" (about {comparison['samples_needed']:,} samples)"
        texts.append(f"{asked} {unit}{about}")
    return texts
