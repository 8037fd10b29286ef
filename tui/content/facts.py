"""What is known of a run in a few lines: phase, step, pace, time left; or how it ended, why, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from textual.content import Content

from surgvqa.runs.history import RunSummary
from surgvqa.terminal.figures import amount
from tui import words
from tui.content import report
from tui.content.outcome import outcome, per_point
from tui.content.report import MUTED
from tui.follow.follower import Follower
from tui.follow.run_model import RunModel

SPARKS = "▁▂▃▄▅▆▇█"
PERCENT_WIDTH = 8
STARVED = 0.1
"""Share of a training step spent waiting for data, from which a small terminal says it instead of the rate."""


def facts(follower: Follower, width: int, resumable: bool) -> Content:
    """For a narrow column: one thing a line."""
    model = follower.model
    share, count = how_far(follower)
    left, speed, rate = time_left(follower), pace(follower), model.learning_rate.last()
    best = model.best_eval()
    lr = "" if rate is None else f"lr {rate:.2e}"
    rows: list[Content | str | None] = [
        Content.assemble(standing(follower), "  ", (model.command, "bold")),
        recorded(follower),
        phase(follower, width) if follower.active and model.phase else None,
    ]
    ended = not follower.active and model.command in ("train", "evaluate")
    if ended:  # what came of it, in place of a bar that moves no more
        known = outcome(model, follower.target.price_per_hour)
        rows += [Content.assemble((f"{name:<17}", MUTED), words.clip(text, width - 17)) for name, text in known]
        figures = [text for text in (words.clip(count, width) if model.total_steps else "",) if text]
        rows += [*joined(figures, width), *preset_and_judged(model, width)]
        return report.lines(*rows, *ending(follower, resumable))
    if share is not None:
        bar = words.bar(width - PERCENT_WIDTH, share, "$primary")
        rows += [Content.assemble(bar, (f" {100 * share:5.1f} %", "bold"))]
    figures = [words.clip(count, width), left, speed, waiting(follower), slowest(follower), money(follower)]
    rows += joined([figure for figure in figures if figure], width)
    if lr:
        rows.append(Content.assemble(f"{lr}  ", (sparkline(model.learning_rate.ys, width - len(lr) - 2), "$secondary")))
    rows += preset_and_judged(model, width)
    if best:
        rows.append(Content.assemble(("best eval ", MUTED), f"{best[1]:.4g}", (f" at step {best[0]:,}", MUTED)))
    return report.lines(*rows, *ending(follower, resumable))


def facts_alone(follower: Follower, width: int, resumable: bool) -> Content:
    """For a terminal without room for a chart: state, bar, loss, time left."""
    model = follower.model
    share, count = how_far(follower)
    loss, best = model.train.last(), model.best_eval()
    figures = [
        f"loss {loss:.4g}" if loss is not None else "",
        f"eval {model.eval.last():.4g}" if best else "",
        words.clip(count, width),
        time_left(follower),
        pace(follower),
    ]
    bar = None
    if share is not None:
        bar = Content.assemble(words.bar(width - PERCENT_WIDTH, share, "$primary"), (f" {100 * share:5.1f} %", "bold"))
    return report.lines(
        Content.assemble(standing(follower), "  ", (model.command, "bold")),
        bar,
        *joined([figure for figure in figures if figure], width),
        *ending(follower, resumable),
    )


def preset_and_judged(model: RunModel, width: int) -> list[Content]:
    """With what it was trained, or what it judges."""
    rows = [
        Content.assemble((f"{name} ", MUTED), words.clip(text, width - len(name) - 1)) for name, text in judged(model)
    ]
    if model.preset and model.command == "train":
        rows.append(Content.assemble(("preset ", MUTED), model.preset))
    return rows


def facts_in_two_lines(follower: Follower, width: int, resumable: bool) -> Content:
    """For a small terminal: state and bar, then the figures, then a line of trouble when there is some; of a run that
    ended badly the whole of it, and what to do."""
    model = follower.model
    share, count = how_far(follower)
    what = "recording" if follower.recording else model.command
    head = Content.assemble(standing(follower), "  ", (what, "bold"))
    if share is not None:
        head = Content.assemble(head, "  ", words.bar(12, share, "$primary"), (f" {100 * share:.0f} %", "bold"))
    if follower.active:
        head = Content.assemble(head, "  ", phase(follower, max(8, width - head.cell_length - 2)))
    rate = model.learning_rate.last()
    waited = waiting(follower, least=STARVED) or slowest(follower, where=False)
    last = waited or ("" if rate is None else f"lr {rate:.2e}")
    figures = [count, pace(follower), time_left(follower), last]
    figures += [money(follower), *(f"{name} {text}" for name, text in judged(model))]
    second = report.waiting("  ·  ".join(figure for figure in figures if figure))
    trouble = ending(follower, resumable)
    if follower.state not in ("failed", "died"):
        trouble = [line.truncate(width, ellipsis=True) for line in trouble[: 1 if follower.active else 2]]
    return report.lines(head, second, *trouble)


def run_row(run: RunSummary, attached: bool, marked: bool = False, width: int = 38) -> Content:
    """A run in the list: state, when it began, command and name; the name below, where it would be cut."""
    part = run.id.rsplit("-", 1)[-1]  # runs that continue each other have one name
    name = f"{run.name} {part}" if run.name else part
    head: list[tuple[str, str] | str] = [
        ("▸" if attached else "◆" if marked else " ", "bold $accent"),
        (words.STATE_MARKS.get(run.state, "?"), words.STATE_STYLES.get(run.state, "")),
        (f" {words.ago(run.started):<6} ", MUTED),
        f"{run.command:<9}",
    ]
    style = "bold" if attached or marked else MUTED
    row = Content.assemble(*head, (name, style))
    if row.cell_length <= width:
        return row
    lines = [name[i : i + width - 3] for i in range(0, len(name), width - 3)]
    return Content("\n").join([Content.assemble(*head), *(Content.assemble(("   " + line, style)) for line in lines)])


def judged(model: RunModel) -> list[tuple[str, str]]:
    """Of an evaluation: the run, the checkpoint and the data that it judges."""
    if model.command != "evaluate":
        return []
    parts = PurePath(str(model.option("checkpoint") or "")).parts
    run = parts[parts.index("runs") + 1] if "runs" in parts[:-1] else ""
    named = {
        "of run": run,
        "checkpoint": "/".join(parts[parts.index(run) + 1 :] if run else parts[-2:]),
        "data": PurePath(str(model.option("eval_data_path") or "")).name,
    }
    return [(name, text) for name, text in named.items() if text]


def standing(follower: Follower) -> Content:
    """The run's state; of a host that is not reached, since when. Whether the job lives only the host can say."""
    connection = follower.target.connection
    if connection is None or connection.kind in ("connected", "connecting") or not follower.active:
        return words.state(follower.state) if follower.silent_s is None else silent(follower.silent_s)
    since = f" since {words.ago(connection.since)}" if connection.kind == "unreachable" else ""
    return Content.assemble((f"○ {connection.kind}{since}", "bold $warning"))


def silent(seconds: float) -> Content:
    """A job that is there and says nothing."""
    return Content.assemble((f"◌ silent: no news for {words.seconds(seconds)}", "bold $warning"))


def recorded(follower: Follower) -> Content | None:
    """That this is no run of the user's."""
    return Content.assemble((str(follower.model.info["recording"]), "$warning")) if follower.recording else None


def joined(figures: list[str], width: int) -> list[str]:
    """Figures on as few lines as they fit on."""
    lines: list[str] = []
    for figure in figures:
        longer = f"{lines[-1]} · {figure}" if lines else figure
        if lines and len(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(figure)
    return lines


def how_far(follower: Follower) -> tuple[float | None, str]:
    """Share done (None: not known) and `step 120/1,040`."""
    model, progress = follower.model, follower.model.current
    if model.total_steps:
        done, unit = float(model.step), "step"
        total: float | None = model.total_steps
    elif progress:
        done, total, unit = progress.done, progress.total, progress.unit
    else:
        return None, ""
    of_total = f"/{amount(total, unit)}" if total else ""
    name = "" if unit == "bytes" else f"{unit} "
    return (done / total if total else None), f"{name}{amount(done, unit)}{of_total}"


def money(follower: Follower) -> str:
    """`$0.52, $1.40 at its end`: what a run at work costs on a host with a price; ''."""
    price, model = follower.target.price_per_hour, follower.model
    if not price or model.elapsed_s is None or not follower.active:
        return ""
    so_far, left = price * model.elapsed_s / 3600, model.left_s if model.total_steps else None
    end = "" if left is None else f", {words.price(so_far + price * left / 3600)} at its end"
    worth = per_point(model.elapsed_s, price, model)
    return f"{words.price(so_far)}{end}{', ' if worth else ''}{worth}"


def time_left(follower: Follower) -> str:
    """`12 min 05 s left` while it runs (before a training's steps: of this phase), `took …` afterwards, '' when it is
    not known."""
    model = follower.model
    if not follower.active:
        return f"took {words.seconds(model.elapsed_s)}"
    if follower.silent_s is not None:
        return ""
    before = f" to {model.phase}" if model.command == "train" and not model.total_steps else ""
    return "" if model.left_s is None else f"{words.seconds(model.left_s)} left{before}"


def pace(follower: Follower) -> str:
    """Samples a second of a training, else the rate of the phase."""
    model, progress = follower.model, follower.model.current
    if follower.silent_s is not None:
        return ""
    if not follower.active and model.mean_samples_per_s:
        return f"{model.mean_samples_per_s:.3g} samples/s on average"
    if model.samples_per_s:
        return f"{model.samples_per_s:.3g} samples/s"
    if progress and progress.rate and follower.active:
        return words.rate(progress.rate, progress.unit)
    return ""


def waiting(follower: Follower, least: float = 0.0) -> str:
    """The share of the last training step that went by waiting for data, when it is at least `least`."""
    share = follower.model.metric.get("data_wait")
    return "" if share is None or share < least else f"{100 * share:.0f} % waiting for data"


def slowest(follower: Follower, where: bool = True) -> str:
    """Which rank the others wait for, when that costs one of them a share of STARVED or more of the last step."""
    model = follower.model
    waits = model.rank_waits
    if not waits or max(waits) < STARVED:
        return ""
    rank = waits.index(min(waits))
    host = f" on {words.clip(model.hosts[rank], 20)}" if where and rank < len(model.hosts) else ""
    return f"{100 * max(waits):.0f} % waiting for rank {rank}{host}"


def phase(follower: Follower, width: int) -> Content:
    """The phase and its text on one line; how far it is, when the bar shows the steps and not this."""
    model = follower.model
    progress = model.progress.get(model.phase)
    share = progress.fraction if progress and model.total_steps and progress.unit != "steps" else None
    done = f"{100 * share:.0f} %  " if share is not None and share < 1 else ""
    text = done + words.clip(model.phase_text, max(0, width - len(model.phase) - 2 - len(done)))
    return Content.assemble(model.phase, (f"  {text}" if text else "", MUTED))


def ending(follower: Follower, resumable: bool) -> list[Content]:
    """Why it ended badly and what to do, why it cannot be followed, or what it warned of."""
    if follower.problem:
        return [Content.assemble((follower.problem, "$error"))]
    damage = [f"{follower.damage}; the rest is shown"] if follower.damage else []
    if follower.state in ("failed", "died"):
        said = follower.model.errors or [line for line in follower.log if line.strip()]
        why = said[-1] if said else "none"
        killed = f"its process ended without a message (killed?); its last line: {why}"
        text = why if follower.state == "failed" else killed
        then = ("c", "continues from the last checkpoint") if resumable else ("3", "starts anew; the log says more")
        way_on = follower.model.way_on
        if way_on:
            text = text.partition("; go on with ")[0]  # the key does what this would have one type
            then = ("o", f"goes on from the last checkpoint {way_on[0]}")
        return [Content.assemble((text, "$error")), report.key_hints(then), *report.warnings(damage)]
    return report.warnings(damage + out_of_memory(follower.model.oom) + follower.model.warnings[-2:])


def out_of_memory(oom: dict[str, Any] | None) -> list[str]:
    """What was done about the last out-of-memory error, first, for a line may be cut; then what had happened."""
    if not oom:
        return []
    text, action = str(oom.get("text", "")), str(oom.get("action", ""))
    happened = text.removesuffix(action).removesuffix(": ")
    step = "" if oom.get("step") is None else f" at step {oom['step']}"
    return [f"out of GPU memory{step}: {'; '.join(part for part in (action, happened) if part)}"]


def sparkline(values: Sequence[float], width: int) -> str:
    """Values as a line of bars at most `width` long; the mean of each stretch."""
    known = [v for v in values if v == v]
    if not known or width < 4:
        return ""
    count = min(width, len(known))
    means = []
    for i in range(count):
        part = known[i * len(known) // count : max(i * len(known) // count + 1, (i + 1) * len(known) // count)]
        means.append(sum(part) / len(part))
    low, high = min(0.0, *means), max(means)
    return "".join(SPARKS[round((m - low) / (high - low) * 7)] if high > low else SPARKS[0] for m in means)
