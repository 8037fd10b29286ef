"""Memory bars: what a run takes of its budget, and what a configuration is predicted to take."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from textual.content import Content

from tui import words
from tui.content.memory import (
    BUDGET_STYLE,
    FILLS,
    PART_STYLES,
    Part,
    device_title,
    holders,
    largest,
    level_style,
    memory_bar,
    predicted_legend,
    processes,
)
from tui.follow.run_model import Device
from tui.widgets.pane import Pane

WORTH_SAYING = 0.02
"""Share of a step that a rank waits, from which it is said."""
FIGURES = 46
"""Cells that the figures before a bar on the same line take, so that the bars stand below each other."""
LEAST_BAR = 8
"""Cells of a bar that is worth drawing."""
PREDICTED = 3
"""Components of the prediction that the gauge names; the smaller ones are shown together."""


class Gauge(Pane):
    """The live memory of a run against its budget, a block for each device."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.devices: dict[str, Device] = {}
        self.predicted: list[Part] = []
        self.fit = ""
        self.budget = 0.0
        self.compact = False
        self.hosts: Sequence[str] = ()
        self.waits: Sequence[float] = ()

    def show_devices(
        self,
        devices: dict[str, Device],
        budget_bytes: float,
        predicted: dict[str, float] | None = None,
        compact: bool = False,
        fit: str = "",
        hosts: Sequence[str] = (),
        waits: Sequence[float] = (),
    ) -> None:
        """New samples by rank, the components of the predicted peak in bytes, and how the run was fitted (`fit`); drawn
        at the width that the widget has. `compact` takes two lines for the run's own device and one for each other.
        Several ranks have a row each, below the name of their machine (`hosts`), with the share of the last step that
        they waited for the slowest (`waits`)."""
        self.hosts, self.waits = hosts, waits
        self.devices, self.budget, self.compact, self.fit = devices, budget_bytes, compact, fit
        self.predicted = largest((Part(name, nbytes) for name, nbytes in (predicted or {}).items()), PREDICTED)
        self.show(self._content)

    def _content(self, width: int) -> Content:
        if not self.devices:
            return Content.assemble(("no memory figures yet", "$muted"))
        if len(self.devices) > 1:
            return Content("\n").join(self._rows(width))
        (device,) = self.devices.values()
        return self._block(str(device.sample.get("device", 0)), device, width)

    def _limits(self, device: Device) -> tuple[float, float]:
        """The bytes that the run may take of a device, and those that its bar stands for. Of a card that is smaller
        than the budget it may take the card."""
        used, total = device.used_bytes, float(device.sample.get("total_bytes") or 0)
        limit = total if total and not device.is_host else self.budget
        budget = min(self.budget, limit) or total or used or 1.0
        return budget, max(budget * 1.08, used, device.peak_bytes) if self.budget else max(total, used, 1.0)

    def _bar(self, device: Device, width: int) -> Content:
        budget, scale = self._limits(device)
        held = holders(device, level_style(device.used_bytes, budget))
        parts = [(nbytes, style) for _, nbytes, style in held]
        return memory_bar(width, parts, scale, budget, device.peak_bytes)

    def _rows(self, width: int) -> list[Content]:
        """The ranks of each machine, the GPUs there that the run does not use, and once what is predicted for each."""
        lines: list[Content] = []
        ranks = sorted(self.devices, key=int)
        for host, group in groupby(ranks, self._host):
            members = list(group)
            if host and not self.compact:
                lines.append(Content.assemble((words.clip(host, width), "bold $accent")))
            for rank in members:
                lines += self._row(rank, host, width)
            ours = {str(self.devices[rank].sample.get("device")) for rank in members}
            others = self.devices[members[0]].sample.get("other_gpus") or []
            further = [self._further(gpu, width) for gpu in others if str(gpu.get("index")) not in ours]
            lines += [line for gpu in further for line in (gpu[:1] if self.compact else gpu)]
        if self.predicted and not self.compact:
            budget, scale = self._limits(self.devices[ranks[0]])
            lines += self._prediction(width, scale, budget, " of each")
        return lines

    def _host(self, rank: str) -> str:
        return self.hosts[int(rank)] if int(rank) < len(self.hosts) else ""

    def _row(self, rank: str, host: str, width: int) -> list[Content]:
        """Figures and a bar, on one line in a small terminal; and what is wrong with the card."""
        device = self.devices[rank]
        sample, used, budget = device.sample, device.used_bytes, self._limits(device)[0]
        name = f"rank {rank}" if device.is_host else f"GPU {sample.get('device', rank)}"
        busy = sample.get("utilization_percent")
        over = max(device.peak_bytes, used) > budget
        facts = [(self._wait(int(rank)), "")]
        if over or not self.compact:
            facts.append((f"peak {words.gb(device.peak_bytes)}", "$error" if over else "$muted"))
        if busy is not None and not device.is_host and not self.compact:
            facts.append((f"{busy:.0f} %", "$muted"))
        figures = Content.assemble(
            (f"{words.clip(host, 12)} " if host and self.compact else "", "bold $accent"),
            (f"{name}  ", "bold"),
            (f"{used / words.GB:.1f}", "bold"),
            (f" of {words.gb(budget)}", BUDGET_STYLE),
        )
        for text, style in facts:
            if text and figures.cell_length + len(text) + 3 <= width:
                figures = Content.assemble(figures, (f" · {text}", style))
        if not self.compact:
            lines = [figures, self._bar(device, width)]
        else:
            gap = 2 + max(0, FIGURES - figures.cell_length)
            room = width - figures.cell_length - gap
            bar = Content.assemble(" " * gap, self._bar(device, room)) if room >= LEAST_BAR else ""
            lines = [Content.assemble(figures, bar)]
        if sample.get("problem"):
            lines.append(Content.assemble((words.clip(str(sample["problem"]), width), "$error")))
        return lines

    def _wait(self, rank: int) -> str:
        """For how much of the last step a rank waited, or that the others waited for it."""
        if rank >= len(self.waits) or max(self.waits) < WORTH_SAYING:
            return ""
        return "slowest" if self.waits[rank] == min(self.waits) else f"waits {100 * self.waits[rank]:.0f} %"

    def _block(self, name: str, device: Device, width: int) -> Content:
        sample, used = device.sample, device.used_bytes
        budget, scale = self._limits(device)
        held = holders(device, level_style(used, budget))
        bar = self._bar(device, width)
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
            whose = [
                Content.assemble((FILLS[i], style), f"{who} {nbytes / 1e9:.1f}")
                for i, (who, nbytes, style) in enumerate(held)
            ]
            lines.insert(2, Content(" ").join(whose))
        if facts:
            lines.insert(1, Content.assemble(("  ".join(facts), "$muted")))
        if sample.get("problem"):
            lines.append(Content.assemble((words.clip(str(sample["problem"]), width), "$error")))
        if sample.get("others"):
            lines.append(Content.assemble((words.clip(f"others: {processes(sample['others'])}", width), "$warning")))
        if self.predicted:
            lines += self._prediction(width, scale, budget)
        lines += [line for gpu in further for line in gpu]
        return Content("\n").join(lines)

    def _prediction(self, width: int, scale: float, budget: float, of: str = "") -> list[Content]:
        peak = sum(part.bytes for part in self.predicted)
        shares = [(part.bytes, PART_STYLES[i]) for i, part in enumerate(self.predicted)]
        fit = [Content.assemble((self.fit, "$muted"))] if self.fit else []
        title = Content.assemble((f"predicted peak{of} ", "$muted"), (words.gb(peak), "bold"))
        return [title, memory_bar(width, shares, scale, budget), predicted_legend(self.predicted, width), *fit]

    def _further(self, gpu: dict[str, Any], width: int) -> list[Content]:
        """A GPU that the run does not use: a line with a bar, and one for who does."""
        if gpu.get("state", "ok") != "ok":
            trouble = f"GPU {gpu.get('index')} {gpu.get('state')}: {gpu.get('problem', '')}"
            return [Content.assemble((words.clip(trouble, width), "$error"))]
        used, total = float(gpu.get("used_bytes") or 0), float(gpu.get("total_bytes") or 0)
        title = f"GPU {gpu.get('index')} "
        figure = f" {words.gb(used)} of {words.gb(total)}" if total else " memory unknown"
        cells = max(4, min(40, width - len(title) - len(figure)))
        bar = memory_bar(cells, [(used, "$muted")], total or 1.0)
        listed = processes(gpu.get("processes") or [])
        whose = [Content.assemble((words.clip(f"  {listed}", width), "$muted"))] if listed else []
        return [Content.assemble(title, bar, (figure, "$muted")), *whose]
