"""The model card in Hugging Face's format: figures with intervals and baselines, and their provenance."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgvqa.evidence.pack import Evidence, options_of
from surgvqa.untrusted import one_line

METRICS = ("keyword", "word", "label")
TAGS = ("surgical-vqa", "video-question-answering", "spoken-questions", "audio", "qwen2-vl")


def card(found: Evidence) -> str:
    """The evidence's README.md: YAML metadata with a model-index, then text."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    name = _name(found)
    results = [
        EvalResult(
            task_type="visual-question-answering",
            dataset_type="jsonl",
            dataset_name=dataset_of(_run(found, run)),
            metric_type="accuracy",
            metric_name=f"{metric} accuracy",
            metric_value=round(scores[f"{metric}_accuracy"], 6),
        )
        for run, scores in found.scores.items()
        for metric in METRICS
    ]
    adapter = any(run.get("command") == "train" for run in found.runs)
    data = ModelCardData(
        model_name=name,
        library_name="peft" if adapter else "transformers",
        tags=list(TAGS),
        eval_results=results or None,
    )
    text = "\n\n".join(part for part in (f"# {name}", *_body(found)) if part)
    made = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")
    return str(made)


def _name(found: Evidence) -> str:
    run = next((run for run in found.runs if run.get("command") in ("train", "merge")), found.runs[0])
    given = options_of(run).get("run_name")
    return _plain(given or run.get("id", "model"))


def _run(found: Evidence, run_id: str) -> dict[str, Any]:
    return next((run for run in found.runs if run.get("id") == run_id), {})


def dataset_of(run: Mapping[str, Any]) -> str:
    """The name of the evaluation's file of samples."""
    path = options_of(run).get("eval_data_path")
    return _plain(Path(str(path)).name) if path else "unknown"


def _plain(text: object) -> str:
    """Untrusted text as one line, without characters that are special in Markdown, HTML or tables."""
    line = one_line(str(text)).replace("\\", "\\\\")
    for sign in "`*_[]<>|#":
        line = line.replace(sign, f"\\{sign}" if sign not in "<>" else ("&lt;" if sign == "<" else "&gt;"))
    return line


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _body(found: Evidence) -> list[str]:
    parts = ["An audio-grafted Qwen2-VL that answers spoken questions about eight frames of a colonoscopy video."]
    for run, scores in found.scores.items():
        parts += _scores(found, run, scores)
    parts += _probes(found)
    if found.notes:
        parts += ["## To know", "\n".join(f"- {_plain(note)}" for note in found.notes)]
    parts += ["## How it was made", *(_provenance_text(run) for run in found.runs)]
    parts.append(
        "## To check\n\n`sha256sum -c SHA256SUMS` checks these files; `surgvqa evidence --check DIR` also computes the "
        "scores again from the predictions, and the hashes of data, frames, sound and weights where they are present."
    )
    return parts


def _scores(found: Evidence, run: str, scores: Mapping[str, Any]) -> list[str]:
    informative, clusters = scores["informative"], scores["clusters"]
    basis = f"{scores['samples']:,} samples"
    basis += f" in {clusters:,} clusters" if clusters else ", treated as independent, so the intervals are too narrow"
    rows = [
        "| % | accuracy | 95 % interval | informative types | 95 % interval |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for metric in METRICS:
        cells = [cell for table in (scores, informative) for cell in _figure(table, metric)]
        rows.append(f"| {metric} | {' | '.join(cells)} |")
    for file in ("train_", ""):
        if (key := f"{file}majority_accuracy") in scores:
            label = f"always the {'training' if file else 'evaluation'}'s most frequent label"
            rows.append(f"| {label} | {_percent(scores[key])} | | {_percent(informative[key])} | |")
    types = ["| question type | n | keyword % | label % | majority % | |", "| --- | ---: | ---: | ---: | ---: | --- |"]
    for kind, row in scores["by_type"].items():
        figures = " | ".join(_percent(row[f"{name}_accuracy"]) for name in ("keyword", "label", "majority"))
        types.append(f"| {_plain(kind)} | {row['n']} | {figures} | {_plain(row['collapsed'])} |")
    return [
        f"## Scores on {dataset_of(_run(found, run))}",
        f"{basis}. Keyword: the label occurs anywhere in the answer, even in a word; word: between word boundaries; "
        f"label: stated as a word, and no other label of its type. {informative['types']} of {len(scores['by_type'])} "
        f"question types are informative (they have more than one label; {informative['samples']:,} samples). A "
        "model that neither looks nor listens reaches the majority accuracy.",
        "\n".join(rows),
        "\n".join(types),
    ]


def _figure(table: Mapping[str, Any], metric: str) -> tuple[str, str]:
    """(accuracy, its interval) as text; no interval without samples."""
    bounds = table.get(f"{metric}_interval")
    return _percent(table[f"{metric}_accuracy"]), f"{_percent(bounds[0])} to {_percent(bounds[1])}" if bounds else ""


def _probes(found: Evidence) -> list[str]:
    parts = []
    for run in found.runs:
        conclusion = run["result"].get("conclusion")
        if run.get("command") == "probe" and isinstance(conclusion, list):
            parts += ["## Does it listen, does it look", "\n".join(f"- {_plain(text)}" for text in conclusion)]
    return parts


def _provenance_text(run: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{_plain(name)} {_plain(text)}" for name, text in sorted(run.get("versions", {}).items()))
    cards = ", ".join(_plain(card.get("name", "")) for card in run.get("gpus", [])) or "no GPU"
    git = run.get("git") or {}
    commit = f"; commit {_plain(git.get('commit', ''))}" + (" with changes" if git.get("dirty") else "") if git else ""
    lines = [
        f"### {_plain(run.get('id', ''))} ({_plain(run.get('state', ''))})",
        f"    {one_line(run['shell'])}",
        f"{versions}; on {cards}{commit}.",
    ]
    hashes = {**(run.get("inputs") or {}), **run["outputs"]}
    if hashes:
        rows = ["| | files | sha256 |", "| --- | ---: | --- |"]
        rows += [f"| {_plain(name)} | {row['files']} | `{row['sha256']}` |" for name, row in hashes.items()]
        lines.append("\n".join(rows))
    return "\n\n".join(lines)
