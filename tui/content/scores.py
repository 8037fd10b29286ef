"""What is known of samples and of answers: the data check, the scores of an evaluation."""

from __future__ import annotations

from typing import Any

from textual.content import Content

from tui import words
from tui.content.report import MUTED, lines


def data_check(data: dict[str, Any]) -> Content:
    """What `check-data` found, in a few lines."""
    bad = {
        "lines that are wrong": len(data.get("errors") or []),
        "frames missing": _count(data.get("missing_frames")),
        "spoken questions missing": _count(data.get("missing_audio")),
        "ids of different questions": _count(data.get("id_collisions")),
        "clips in training and evaluation": _count(data.get("shared_clips")),
        "samples whose label contradicts another's": _count(data.get("contradictions_list")),
        "wordings, one a type: all that listening has to tell apart": _only_wordings(data.get("wordings")),
    }
    majority = data.get("majority_accuracy")
    known = f", always the most frequent answer: {percent(majority)}" if isinstance(majority, (int, float)) else ""
    verdict = ("✓ ", "$success") if data.get("ok") else ("✗ ", "$error")
    rows = [Content.assemble(("! ", "bold $warning"), (f"{n:,} {what}", "$warning")) for what, n in bad.items() if n]
    if unseen := [str(name) for name in data.get("not_checked") or []]:
        rows.append(Content.styled(f"not looked at: {' and '.join(unseen)}", MUTED))
    return lines(Content.assemble(verdict, f"{_count(data.get('samples')):,} samples", (known, MUTED)), *rows)


def _only_wordings(wordings: Any) -> int:
    """How many wordings there are, when each question type has one; else 0."""
    single = isinstance(wordings, dict) and all(number == 1 for number in wordings.values())
    return len(wordings) if single else 0


def _count(value: Any) -> int:
    return len(value) if isinstance(value, (list, dict)) else int(value) if isinstance(value, (int, float)) else 0


def evaluation(result: dict[str, Any], width: int) -> Content:
    """Accuracy by question type, a bar each, with the majority label's accuracy as the mark to beat."""
    overall = [
        (name.replace("_", " "), float(value))
        for name in ("keyword_accuracy", "label_accuracy", "majority_accuracy")
        if isinstance(value := result.get(name), (int, float))
    ]
    rows: list[Content | str] = [
        Content.assemble(*(part for name, v in overall for part in ((f"{name} ", MUTED), (f"{percent(v)}   ", "bold"))))
    ]
    by_type = result.get("by_type") or {}
    label = min(28, max((len(t) for t in by_type), default=0))
    bar = max(8, min(50, width - label - 34))
    most = max((len(str(entry.get("n", ""))) for entry in by_type.values()), default=0)
    collapsed = set(result.get("collapsed_types") or [])
    for name, entry in sorted(by_type.items()):
        value = next(
            (entry[k] for k in ("keyword_accuracy", "accuracy") if isinstance(entry.get(k), (int, float))), 0.0
        )
        majority = entry.get("majority_accuracy")
        style = "$success" if majority is None or value > majority else "$warning"
        rows.append(
            Content.assemble(
                (f"{words.clip(name, label):<{label}} ", "bold $warning" if name in collapsed else ""),
                words.bar(bar, value, style),
                f" {percent(value):>7}",
                (f" of {entry['n']:<{most}}" if "n" in entry else "", MUTED),
                (f"  majority {percent(majority)}" if majority is not None else "", MUTED),
            )
        )
    if collapsed:
        rows += [
            "",
            Content.assemble(
                ("! ", "bold $warning"), (f"almost always the same answer: {', '.join(sorted(collapsed))}", "$warning")
            ),
        ]
    return lines(*rows)


def percent(share: float) -> str:
    """0.3604 as `36.0 %`."""
    return f"{100 * share:.1f} %"
