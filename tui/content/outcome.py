"""What came of a run, in figures: for one that ended, and for runs beside each other."""

from __future__ import annotations

from typing import Any

from textual.content import Content

from remote.cloud.meter import cost_per_point, points_above_majority
from tui import words
from tui.follow.run_model import RunModel

MUTED = "$muted"


def outcome(model: RunModel, price_per_hour: float | None = None) -> list[tuple[str, str]]:
    """(name, figure) of what is known: losses, scores, duration, peak, cost."""
    result = model.result
    final = result.get("train_loss", model.train.last())
    best = model.best_eval()
    seconds = model.elapsed_s
    peak = max((device.peak_bytes for device in model.devices.values()), default=0.0)
    found = {
        "final loss": _figure(final) if model.command == "train" else "",
        "best eval loss": f"{best[1]:.4g} at step {best[0]:,}" if best else "",
        "steps": f"{model.step:,}" if model.step else "",
        "keyword accuracy": score(result, "keyword_accuracy", "keyword_interval") or _last(model),
        "label accuracy": score(result, "label_accuracy", "label_interval"),
        "majority": score(result, "majority_accuracy", ""),
        "samples/s": f"{model.mean_samples_per_s:.3g}" if model.mean_samples_per_s else "",
        "took": words.seconds(seconds) if seconds is not None else "",
        "peak memory": words.gb(peak) if peak else "",
        "cost": cost(seconds, price_per_hour),
        "cost per point": per_point(seconds, price_per_hour, model),
    }
    return [(name, text) for name, text in found.items() if text]


def score(result: dict[str, Any], name: str, interval: str) -> str:
    """`77.0 % (71.2 to 82.1)`: a score and its 95 % interval; '' where there is none."""
    value, bounds = result.get(name), result.get(interval)
    if not isinstance(value, (int, float)):
        return ""
    text = f"{100 * value:.1f} %"
    if isinstance(bounds, list) and len(bounds) == 2 and all(isinstance(b, (int, float)) for b in bounds):
        text += f" ({100 * bounds[0]:.1f} to {100 * bounds[1]:.1f})"
    return text


def cost(seconds: float | None, price_per_hour: float | None) -> str:
    """What the host took for it."""
    return "" if seconds is None or not price_per_hour else words.price(seconds / 3600 * price_per_hour)


def per_point(seconds: float | None, price_per_hour: float | None, model: RunModel) -> str:
    """`$0.05 a point above the majority`: the run's cost so far per point of accuracy; '' if either is unknown."""
    if seconds is None or not price_per_hour:
        return ""
    scores = model.result if "majority_accuracy" in model.result else model.answers  # both of the same samples
    points = points_above_majority(scores)
    if points is None:
        return ""
    each = cost_per_point(seconds / 3600 * price_per_hour, scores)
    return f"{words.price(each)} a point above the majority" if each else "accuracy not above the majority"


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) and value == value else ""


def _last(model: RunModel) -> str:
    value = model.accuracy.last()
    return "" if value is None else f"{100 * value:.1f} % at the last evaluation"


def differences(models: list[RunModel], everything: bool = False) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all runs, with the value in each; `everything`: also those that are."""
    names = sorted({name for model in models for name in model.info.get("options") or {}} - {"run_name", "output_dir"})
    rows = [(name, [words.value(model.option(name)) for model in models]) for name in names]
    return [(name, values) for name, values in rows if everything or len(set(values)) > 1]


def beside(titles: list[Content], rows: list[tuple[str, list[str]]], width: int) -> list[Content]:
    """A table with a column for each run; a value that differs from the first is marked."""
    label = min(28, max((len(name) for name, _ in rows), default=10) + 2)
    column = max(10, (width - label) // max(1, len(titles)))
    lines = [Content("").join([Content(" " * label), *(_cell(title, column) for title in titles)])] if titles else []
    for name, values in rows:
        cells = [
            _cell(Content.assemble((value or "–", "bold $accent" if i and value != values[0] else "")), column)
            for i, value in enumerate(values)
        ]
        lines.append(Content("").join([Content.assemble((f"{words.clip(name, label - 1):<{label}}", MUTED)), *cells]))
    return lines


def _cell(content: Content, width: int) -> Content:
    cut = content.truncate(width - 1, ellipsis=True)
    return Content("").join([cut, Content(" " * (width - cut.cell_length))])
