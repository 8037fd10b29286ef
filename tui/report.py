"""Contents drawn from what jobs write: plans, progress, reports. Pure functions; missing fields are left out."""

from __future__ import annotations

from typing import Any

from textual.content import Content

from tui import words
from tui.follow import Follower, Progress

MUTED = "$muted"


def lines(*parts: Content | str | None) -> Content:
    """Contents below each other; None is left out."""
    return Content("\n").join(Content(p) if isinstance(p, str) else p for p in parts if p is not None)


def problem(text: str) -> Content:
    """An error, in place."""
    return Content.assemble(("✗ ", "$error"), (text or "it failed and did not say why", "$error"))


def warnings(texts: list[Any]) -> list[Content]:
    """One line a warning."""
    return [Content.assemble(("! ", "bold $warning"), (_text(w), "$warning")) for w in texts]


def facts(pairs: list[tuple[str, Any]], width: int = 18) -> list[Content]:
    """`name   value` lines; None is left out."""
    return [Content.assemble((f"{name:<{width}}", MUTED), str(value)) for name, value in pairs if value is not None]


def _text(entry: Any) -> str:
    return str(entry.get("text") or entry) if isinstance(entry, dict) else str(entry)


# --- jobs ------------------------------------------------------------------------------------------------------------


def progress_line(progress: Progress, width: int) -> Content:
    """One phase: bar, share, amount, rate, time left."""
    done = words.amount(progress.done, progress.unit)
    total = f" of {words.amount(progress.total, progress.unit)}" if progress.total else ""
    unit = "" if progress.unit == "bytes" else f" {progress.unit}"
    fraction = progress.fraction
    text = f"{done}{total}{unit}"
    if progress.rate and (fraction is None or fraction < 1):
        text += f"  {words.rate(progress.rate, progress.unit)}"
        if progress.left_s is not None:
            text += f"  {words.seconds(progress.left_s)} left"
    bar = max(8, min(40, width - 58))
    share = f"{100 * fraction:4.0f} % " if fraction is not None else "       "
    style = "$success" if fraction == 1 else "$primary"
    name = words.clip(progress.phase, 16)
    return Content.assemble(f"{name:<17}", words.bar(bar, fraction or 0.0, style), f" {share} ", (text, MUTED))


def job_progress(follower: Follower, width: int) -> Content:
    """A running job that has no chart: its phases with their progress, and warnings."""
    model = follower.model
    head = Content.assemble(
        words.state(follower.state),
        "  ",
        (model.phase or "starting", "bold"),
        (f"  {model.phase_text}" if model.phase_text else "", MUTED),
    )
    rows = [progress_line(p, width) for p in model.progress.values()]
    return lines(head, "", *rows, *([""] if model.warnings else []), *warnings(model.warnings))


def job_end(follower: Follower, width: int) -> Content:
    """How a job ended, why when it went wrong, and what to do about it."""
    model = follower.model
    parts: list[Content | str] = [
        Content.assemble(words.state(follower.state), (f"  after {words.seconds(model.elapsed_s)}", MUTED))
    ]
    parts += [problem(text) for text in model.errors[-3:]]
    if follower.state in ("died", "failed") and not model.errors:
        said = [line for line in follower.log if line.strip()]
        parts += [Content.assemble(("last words  ", MUTED), line) for line in said[-3:]]
    parts += warnings(model.warnings)
    if follower.state == "died":
        parts.append(
            Content.assemble(("The process is gone without a word: killed, or the machine went down.", "$warning"))
        )
    parts += facts([(k, v) for k, v in model.result.items() if isinstance(v, (int, float, str, bool)) and k != "state"])
    return lines(*parts)


# --- merge -----------------------------------------------------------------------------------------------------------


def merge_plan(data: dict[str, Any]) -> Content:
    """What the dry run found."""
    shown = {
        k: v for k, v in data.items() if k not in ("warnings", "run", "dry_run") and not isinstance(v, (dict, list))
    }
    pairs = [(k.removesuffix("_bytes").replace("_", " "), _figure(k, v)) for k, v in shown.items()]
    enough = (data.get("free_bytes") or 0) >= (data.get("needed_bytes") or data.get("output_bytes") or 0)
    disk = None if "free_bytes" not in data else ("", "") if enough else problem("not enough free disk")
    return lines(
        *warnings(data.get("warnings") or []),
        *facts(pairs, 22),
        disk if isinstance(disk, Content) else None,
        "",
        Content.assemble(("m", "bold $footer-key-foreground"), (" starts the merge", MUTED)),
    )


def _figure(key: str, value: Any) -> str:
    if key.endswith("_bytes") and isinstance(value, (int, float)):
        return words.size(value)
    if key in ("seconds",) or key.endswith("_s"):
        return words.seconds(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def merge_report(data: dict[str, Any], width: int) -> Content:
    """merge_report.json: figures, warnings first, and a bar a layer of ‖ΔW‖/‖W‖."""
    pairs = [
        ("modules merged", data.get("modules_merged")),
        ("tensors copied", data.get("tensors_copied")),
        ("took", words.seconds(data["seconds"]) if "seconds" in data else None),
        ("peak memory", words.size(data["peak_rss_bytes"]) if data.get("peak_rss_bytes") else None),
    ]
    head = Content.assemble(("✓ merged", "bold $success"), (f"  {data.get('output', '')}", MUTED))
    return lines(head, *warnings(data.get("warnings") or []), *facts(pairs), "", *layer_bars(layer_deltas(data), width))


def layer_deltas(data: dict[str, Any]) -> list[tuple[str, float]]:
    """(layer, ‖ΔW‖/‖W‖) in order."""
    found = data.get("layers") or {}
    rows = found.items() if isinstance(found, dict) else ((r.get("layer"), r) for r in found)
    deltas = []
    for name, entry in rows:
        value = entry.get("relative_delta") if isinstance(entry, dict) else entry
        if isinstance(value, (int, float)):
            deltas.append((str(name), float(value)))
    return deltas


def layer_bars(deltas: list[tuple[str, float]], width: int) -> list[Content]:
    """A bar a layer, in two columns when there is room."""
    if not deltas:
        return []
    most = max(v for _, v in deltas) or 1.0
    label = max(len(n) for n, _ in deltas)
    columns = 2 if width >= 2 * (label + 30) and len(deltas) > 8 else 1
    bar = max(6, min(40, width // columns - label - 14))
    cells = [
        Content.assemble((f"{name:>{label}} ", MUTED), words.bar(bar, value / most, "$primary"), f" {value:8.2e}  ")
        for name, value in deltas
    ]
    rows = -(-len(cells) // columns)
    heading = Content.assemble(("how far each layer moved", "bold"), ("   ‖ΔW‖ / ‖W‖", MUTED))
    return [heading, *(Content("").join(cells[row::rows]) for row in range(rows))]


def audit(data: dict[str, Any]) -> Content:
    """What the audit of a checkpoint said."""
    good = data.get("ok")
    verdict = ("✓ sound", "bold $success") if good else ("✗ not sound", "bold $error")
    dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in (data.get("dtypes") or {}).items())
    offenders = [
        Content.assemble(
            ("✗ ", "$error"), f"{o.get('name')}  {o.get('dtype')}  {o.get('shape')}", (f"  {o.get('shard')}", MUTED)
        )
        for o in (data.get("offenders") or [])[:50]
    ]
    return lines(
        Content.assemble(verdict, (f"  {data.get('tensors', 0):,} tensors: {dtypes}", MUTED)),
        *(problem(_text(p)) for p in (data.get("problems") or [])[:50]),
        *offenders,
    )


# --- evaluation ------------------------------------------------------------------------------------------------------


def evaluation(result: dict[str, Any], width: int) -> Content:
    """Accuracy by question type, a bar each, with the majority label's accuracy as the mark to beat."""
    overall = [
        (name.replace("_", " "), result.get(name))
        for name in ("keyword_accuracy", "label_accuracy", "majority_accuracy")
        if isinstance(result.get(name), (int, float))
    ]
    rows: list[Content | str] = [
        Content.assemble(*(part for name, v in overall for part in ((f"{name} ", MUTED), (f"{percent(v)}   ", "bold"))))
    ]
    by_type = result.get("by_type") or {}
    label = min(28, max((len(t) for t in by_type), default=0))
    bar = max(8, min(50, width - label - 26))
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
                (f" of {entry['samples']}" if "samples" in entry else "", MUTED),
            )
        )
    if collapsed:
        rows += [
            "",
            Content.assemble(
                ("! ", "bold $warning"), (f"one answer for nearly all: {', '.join(sorted(collapsed))}", "$warning")
            ),
        ]
    return lines(*rows)


def percent(share: float) -> str:
    """0.3604 as `36.0 %`."""
    return f"{100 * share:.1f} %"
