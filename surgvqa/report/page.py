"""Renders the page: one HTML document with scores, samples and media. Jinja2 with autoescape; no framework."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgvqa.evaluation.definitions import DEFINITIONS
from surgvqa.report.collect import Answer, Entry, Model
from surgvqa.report.media import Clip
from surgvqa.report.probes import probes

HERE = Path(__file__).parent
GENERATOR = '<meta name="generator" content="surgvqa report">'
SUFFIX = "_accuracy"


@dataclass
class Page:
    """The template's variables."""

    title: str
    made: str
    """Date and time as text."""
    models: list[Model] = field(default_factory=list)
    entries: Sequence[Entry] = ()
    clips: Sequence[Clip] = ()
    parts: Mapping[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    comparisons: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """{model: its comparison with the first}, see evaluation.compare."""
    linked: bool = False


def render(page: Page) -> Iterator[str]:
    """Yields the HTML document in pieces."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = percent
    environment.filters["points"] = points
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    files = "data: file: 'self'" if page.linked else "data:"
    yield from environment.get_template("page.html").generate(
        page=page,
        style=Markup(style),
        script=Markup(script),
        policy=f"default-src 'none'; base-uri 'none'; form-action 'none'; img-src {files}; media-src {files}; "
        f"style-src '{_digest(style)}'; script-src '{_digest(script)}'",
        generator=Markup(GENERATOR),
        data=document(page),
        metrics=metrics(page.models),
        definitions=DEFINITIONS,
        types=types(page.models),
        probes=probes(page.models),
        figures=[(model.name, figures(model.scores)) for model in page.models],
    )


def _digest(text: str) -> str:
    """The hash of an inline style or script in a content security policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def percent(share: float) -> str:
    """0.664 as 66.4."""
    return f"{100 * share:.1f}"


def points(difference: float) -> str:
    """0.0123 as +1.2."""
    return f"{100 * difference:+.1f}"


# --- scores -----------------------------------------------------------------------------------------------------------


@dataclass
class Score:
    """One bar: a model's accuracy, its interval if known, and the majority accuracy to beat."""

    model: str
    value: float
    interval: tuple[float, float] | None
    majority: float | None


def metrics(models: Sequence[Model]) -> dict[str, list[Score]]:
    """{metric: a bar for each model that has it} for every `…_accuracy`, with separate ones for informative types."""
    found: dict[str, list[Score]] = {}
    for model in models:
        tables = {"": model.scores, "informative types: ": model.scores.get("informative")}
        for prefix, table in tables.items():
            for metric, value in _accuracies(table).items():
                assert isinstance(table, dict)
                interval = table.get(f"{metric}_interval")
                majority = table.get("train_majority_accuracy", table.get("majority_accuracy"))
                score = Score(model.name, value, _pair(interval), majority if _is_share(majority) else None)
                found.setdefault(prefix + metric, []).append(score)
    return found


def types(models: Sequence[Model]) -> dict[str, list[dict[str, Any] | None]]:
    """{question type: each model's row}: `n`, `accuracies`, `majority`, `labels`, `confusion`, `note`."""
    rows = [_type_rows(model) for model in models]
    names = sorted({name for row in rows for name in row})
    return {name: [row.get(name) for row in rows] for name in names}


def _type_rows(model: Model) -> dict[str, dict[str, Any]]:
    by_type = model.scores.get("by_type")
    rows = {}
    for name, row in by_type.items() if isinstance(by_type, dict) else ():
        if isinstance(row, dict):
            rows[str(name)] = {
                "n": row.get("n", row.get("samples", "")),
                "accuracies": _accuracies(row),
                "majority": row["majority_accuracy"] if _is_share(row.get("majority_accuracy")) else None,
                "labels": _counts(row.get("labels")),
                "predicted": _counts(row.get("predicted")),
                "confusion": _confusion(row.get("confusion")),
                "note": str(row.get("collapsed") or ""),
            }
    return rows


def _accuracies(table: Any) -> dict[str, float]:
    """The accuracies in a table, without majority accuracies."""
    if not isinstance(table, dict):
        return {}
    return {
        name.removesuffix(SUFFIX): value
        for name, value in table.items()
        if name.endswith(SUFFIX) and "majority" not in name and _is_share(value)
    }


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def _pair(value: Any) -> tuple[float, float] | None:
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(v, (int, float)) for v in value):
        return max(0.0, value[0]), min(1.0, value[1])
    return None


def _counts(value: Any) -> dict[str, int]:
    return {str(k): v for k, v in value.items() if isinstance(v, int)} if isinstance(value, dict) else {}


def _confusion(value: Any) -> dict[str, dict[str, int]]:
    """{label: {answered label: count}} with the same columns in every row; {} without a table."""
    if not isinstance(value, dict) or not all(isinstance(row, dict) for row in value.values()):
        return {}
    columns = sorted({str(name) for row in value.values() for name in row}, key=lambda name: (name not in value, name))
    return {str(label): {name: _counts(row).get(name, 0) for name in columns} for label, row in value.items()}


def figures(scores: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """(name, text) of every plain figure in the scores, without tables by type."""
    rows = []
    for name, value in scores.items():
        if isinstance(value, dict) and name != "by_type":
            rows += figures(value, f"{prefix}{name}.")
        elif isinstance(value, (str, int, float, bool)):
            rows.append((prefix + name, f"{value:.4g}" if isinstance(value, float) else str(value)))
        elif isinstance(value, (list, tuple)) and value and all(isinstance(v, (str, int, float)) for v in value):
            rows.append((prefix + name, ", ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in value)))
    return rows


# --- samples ----------------------------------------------------------------------------------------------------------


def document(page: Page) -> dict[str, Any]:
    """The data for the page's script. Keys are short because every sample repeats them."""
    marks = list(dict.fromkeys(m for e in page.entries for a in e.answers if a for m in a.marks))
    return {
        "models": [model.name for model in page.models],
        "marks": sorted(marks, key=lambda mark: (mark != "label", mark)),
        "samples": [_row(entry, clip) for entry, clip in zip(page.entries, page.clips)],
    }


def _row(entry: Entry, clip: Clip) -> dict[str, Any]:
    row: dict[str, Any] = {
        "video": entry.video,
        "id": entry.id,
        "type": entry.type,
        "question": entry.question,
        "label": entry.label,
        "reference": entry.reference,
        "answers": [_answer_row(answer) for answer in entry.answers],
        "frames": clip.names,
        "notes": list(dict.fromkeys(clip.notes)),
    }
    if clip.strip:
        row |= {"strip": clip.strip, "ratio": round(clip.ratio, 4)}
    if clip.urls:
        row["urls"] = clip.urls
    if clip.sound:
        row["sound"] = clip.sound
    return row


def _answer_row(answer: Answer | None) -> dict[str, Any] | None:
    if answer is None:
        return None
    took = {} if answer.milliseconds is None else {"ms": round(answer.milliseconds)}
    return {"text": answer.text, "marks": answer.marks, **took}
