"""Memory bars: what a run takes of its budget, and what a configuration is predicted to take."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from textual.content import Content

from tui import words
from tui.follow.follower import Device
from tui.widgets.pane import Pane

BUDGET_STYLE = "bold $accent"
CLOSE = 0.9  # of the budget: from here on the bar warns


@dataclass(frozen=True)
class Part:
    """A named share of a stacked bar, in bytes."""

    name: str
    bytes: float


PREDICTED = 3
"""Components of the prediction that the gauge names; the smaller ones are shown together."""
LEAST = 0.005
"""Share of the whole from which a part has a row of its own."""
PART_STYLES = ("#4f9dde", "#57c7b6", "#c49ae8", "#e8b85c", "#7fbf6a", "#e07f7f", "#8aa0b8", "#d88fc0")


def level_style(used: float, budget: float) -> str:
    """Calm, close, over."""
    if used > budget:
        return "$error"
    return "$warning" if used > CLOSE * budget else "$success"


def memory_bar(
    width: int, parts: list[tuple[float, str]], scale: float, budget: float | None = None, peak: float = 0.0
) -> Content:
    """`parts` (bytes, style) stacked on a track of `scale` bytes; a tick at the peak and a line at the budget."""
    cells: list[tuple[str, str]] = [("━", "$panel-lighten-2")] * width
    at = 0.0
    for amount, style in parts:
        first, at = round(at / scale * width), at + amount
        for cell in range(max(0, first), min(width, round(at / scale * width))):
            cells[cell] = ("█", style)
    if parts and at > 0 and cells[0][0] != "█":  # something is never nothing
        cells[0] = ("▌", parts[0][1])
    peak_cell = min(width - 1, int(peak / scale * width))
    if peak > at and cells[peak_cell][0] == "━":
        cells[peak_cell] = ("┃", "$muted")
    if budget is not None:
        cells[max(0, min(width - 1, int(budget / scale * width)))] = ("┃", BUDGET_STYLE)
    return Content.assemble(*cells)


class Gauge(Pane):
    """The live memory of a run against its budget, a block for each device."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.devices: dict[str, Device] = {}
        self.predicted: list[Part] = []
        self.fit = ""
        self.budget = 0.0
        self.compact = False

    def show_devices(
        self,
        devices: dict[str, Device],
        budget_bytes: float,
        predicted: dict[str, float] | None = None,
        compact: bool = False,
        fit: str = "",
    ) -> None:
        """New samples, the components of the predicted peak in bytes, and how the run was fitted (`fit`); drawn at the
        width that the widget has. `compact` takes two lines for the run's own device and one for each other."""
        self.devices, self.budget, self.compact, self.fit = devices, budget_bytes, compact, fit
        self.predicted = largest((Part(name, nbytes) for name, nbytes in (predicted or {}).items()), PREDICTED)
        self.show(self._content())

    def on_resize(self) -> None:
        self.show(self._content())

    def _content(self) -> Content:
        if not self.devices:
            return Content.assemble(("no memory figures yet", "$muted"))
        blocks = [self._block(name, device) for name, device in sorted(self.devices.items())]
        return Content("\n").join(blocks)

    def _block(self, name: str, device: Device) -> Content:
        width = max(10, self.size.width)
        sample, used = device.sample, device.used_bytes
        total = float(sample.get("total_bytes") or 0)
        budget = self.budget or total or used or 1.0
        scale = max(budget * 1.08, used, device.peak_bytes) if self.budget else max(total, used, 1.0)
        held = holders(device, level_style(used, budget))
        bar = memory_bar(width, [(nbytes, style) for _, nbytes, style in held], scale, budget, device.peak_bytes)
        title = Content.assemble((device_title(name, sample), "bold"))
        now = Content.assemble(
            (words.gb(used), "bold"), (" of ", "$muted"), (f"{words.gb(budget)} budget", BUDGET_STYLE)
        )
        headroom = budget - max(device.peak_bytes, used)
        room = (f"headroom {words.gb(headroom)}", "") if headroom >= 0 else (f"over by {words.gb(-headroom)}", "$error")
        rest = Content.assemble((f"peak {words.gb(device.peak_bytes)} · ", "$muted"), room)
        dot = Content.assemble((" · ", "$muted"))
        further = [self._further(gpu, width) for gpu in sample.get("other_gpus") or []]
        if self.compact:
            short = Content.assemble(("no GPU: host memory" if device.is_host else f"GPU {name}", "bold"))
            return Content("\n").join([dot.join([short, now, rest]), bar, *(lines[0] for lines in further)])
        facts = [
            f"{sample[key]:.0f}{unit}"
            for key, unit in (("utilization_percent", " %"), ("temperature_c", " °C"), ("power_w", " W"))
            if sample.get(key) is not None and not device.is_host
        ]
        lines = [title, bar, now, rest]
        if len(held) > 1:
            whose = [Content.assemble(("█", style), f"{who} {nbytes / 1e9:.1f}") for who, nbytes, style in held]
            lines.insert(2, Content(" ").join(whose))
        if facts:
            lines.insert(1, Content.assemble(("  ".join(facts), "$muted")))
        if sample.get("others"):
            lines.append(Content.assemble((words.clip(f"others: {processes(sample['others'])}", width), "$warning")))
        if self.predicted:
            peak = sum(part.bytes for part in self.predicted)
            lines.append(Content.assemble(("predicted peak ", "$muted"), (words.gb(peak), "bold")))
            shares = [(part.bytes, PART_STYLES[i]) for i, part in enumerate(self.predicted)]
            lines += [memory_bar(width, shares, scale, budget), predicted_legend(self.predicted, width)]
            if self.fit:
                lines.append(Content.assemble((self.fit, "$muted")))
        lines += [line for gpu in further for line in gpu]
        return Content("\n").join(lines)

    def _further(self, gpu: dict[str, Any], width: int) -> list[Content]:
        """A GPU that the run does not use: a line with a bar, and one for who does."""
        used, total = float(gpu.get("used_bytes") or 0), float(gpu.get("total_bytes") or 0)
        title = f"GPU {gpu.get('index')} "
        figure = f" {words.gb(used)} of {words.gb(total)}" if total else " memory unknown"
        cells = max(4, min(40, width - len(title) - len(figure)))
        bar = memory_bar(cells, [(used, "$muted")], total or 1.0)
        listed = processes(gpu.get("processes") or [])
        whose = [Content.assemble((words.clip(f"  {listed}", width), "$muted"))] if listed else []
        return [Content.assemble(title, bar, (figure, "$muted")), *whose]


def holders(device: Device, style: str) -> list[tuple[str, float, str]]:
    """The run's own memory as (who, bytes, style): tensors, what torch's allocator keeps for later ones, and the
    driver's own share of the process (context and kernels). One part where the allocator is not asked: on a host."""
    sample = device.sample
    allocated, reserved = sample.get("allocated_bytes"), sample.get("reserved_bytes")
    if allocated is None or reserved is None:
        return [("process", device.used_bytes, style)]
    driver = max(0.0, float(sample.get("process_bytes") or 0) - reserved)
    parts = [("tensors", float(allocated), style), ("cached", float(reserved - allocated), "$secondary")]
    return [*parts, ("CUDA", driver, "$muted")] if driver else parts


def largest(parts: Iterable[Part], count: int) -> list[Part]:
    """The `count` largest parts, and all others, and what is too small to see, as one."""
    listed = sorted(parts, key=lambda part: -part.bytes)
    visible = sum(part.bytes for part in listed) * LEAST
    shown = [part for part in listed[:count] if part.bytes >= visible]
    rest = sum(part.bytes for part in listed[len(shown) :])
    return shown + ([Part("the rest", rest)] if rest else [])


def processes(listed: list[dict[str, Any]]) -> str:
    """Who holds memory on a GPU: names and sizes, as far as they are known."""
    return ", ".join(
        f"{p.get('name') or 'pid {}'.format(p.get('pid'))}"
        + (f" {words.gb(p['used_bytes'])}" if p.get("used_bytes") else "")
        for p in listed
    )


def device_title(name: str, sample: dict[str, Any]) -> str:
    """The GPU by its number and name; a host says plainly that it is no GPU."""
    if sample.get("backend") == "host":
        return "no GPU here: host memory"
    return " ".join(str(v).removeprefix("NVIDIA ") for v in ("GPU", name, sample.get("name")) if v not in (None, ""))


def predicted_bar(width: int, parts: list[Part], peak: float, budget: float) -> Content:
    """A configuration's components stacked against the budget."""
    scale = max(peak, budget) * 1.08
    shares = [(part.bytes, PART_STYLES[i % len(PART_STYLES)]) for i, part in enumerate(parts)]
    return memory_bar(width, shares or [(peak, level_style(peak, budget))], scale, budget)


def predicted_legend(parts: list[Part], width: int) -> Content:
    """A row for each colour of `predicted_bar`, in two columns where there is room."""
    columns = 2 if width >= 64 else 1
    column = width // columns
    cells = []
    for i, part in enumerate(parts):
        figure = words.gb(part.bytes)
        name = words.clip(part.name, column - len(figure) - 5)
        room = column - 4 - len(figure)
        style = PART_STYLES[i % len(PART_STYLES)]
        cells.append(Content.assemble(("█ ", style), f"{name:<{room}}", (figure, "$muted"), "  "))
    height = -(-len(cells) // columns)
    return Content("\n").join(Content("").join(cells[row::height]) for row in range(height))
