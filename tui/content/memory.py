"""GPU memory as bars and legends."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from textual.content import Content

from tui import words
from tui.follow.run_model import Device

BUDGET_STYLE = "bold $accent"
CLOSE = 0.9  # of the budget: from here on the bar warns


@dataclass(frozen=True)
class Part:
    """A named share of a stacked bar, in bytes."""

    name: str
    bytes: float


LEAST = 0.005
"""Share of the whole from which a part has a row of its own."""
FILLS = "█▓▒░▚▞▙▜" if "NO_COLOR" in os.environ else "████████"
"""What the parts of a bar are drawn with: shapes tell them apart where no colour does."""
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
    for number, (amount, style) in enumerate(parts):
        first, at = round(at / scale * width), at + amount
        for cell in range(max(0, first), min(width, round(at / scale * width))):
            cells[cell] = (FILLS[number % len(FILLS)], style)
    if parts and at > 0 and cells[0][0] == "━":  # something is never nothing
        cells[0] = ("▌", parts[0][1])
    peak_cell = min(width - 1, int(peak / scale * width))
    if peak > at and cells[peak_cell][0] == "━":
        cells[peak_cell] = ("┃", "$muted")
    if budget is not None:
        cells[max(0, min(width - 1, int(budget / scale * width)))] = ("┃", BUDGET_STYLE)
    return Content.assemble(*cells)


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
        fill = FILLS[i % len(FILLS)]
        cells.append(Content.assemble((f"{fill} ", style), f"{name:<{room}}", (figure, "$muted"), "  "))
    height = -(-len(cells) // columns)
    return Content("\n").join(Content("").join(cells[row::height]) for row in range(height))
