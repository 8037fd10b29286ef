"""Memory bars: what a run takes of its budget, and what a configuration is predicted to take."""

from __future__ import annotations

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
