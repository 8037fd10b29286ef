"""The figures of a run over its steps: one chart, or six where there is room; one view and one cursor for all."""

from __future__ import annotations

from dataclasses import dataclass

from textual import on
from textual.app import ComposeResult
from textual.containers import Container, Vertical
from textual.content import Content
from textual.message import Message

from tui.follow.run_model import RunModel
from tui.follow.series import Mark, Series
from tui.widgets.canvas import tick_text
from tui.widgets.chart import Chart, extent_of
from tui.widgets.pane import Pane
from tui.widgets.titles import set_subtitle, set_title

MANY = (120, 30)
"""Columns and rows from which all charts are shown."""
NOT_MEASURED = "not measured yet"
STYLES = {
    "chart--train": "$chart-train",
    "chart--eval": "$chart-eval",
    "chart--second": "$secondary",
    "chart--third": "$success",
}


@dataclass(frozen=True)
class Figure:
    """One chart: its title and its lines."""

    title: str
    series: list[Series]


def figures_of(model: RunModel) -> list[Figure]:
    """What a training tells of its steps."""
    return [
        Figure("loss", [model.train, model.eval]),
        Figure("accuracy", [model.accuracy]),
        Figure("gradient norm", [model.grad_norm]),
        Figure("learning rate", [model.learning_rate]),
        Figure("samples/s", [model.speed]),
        Figure("memory, GB", [model.memory]),
    ]


class Charts(Container):
    """Shows the first figure, another one at a key, or all of them."""

    class CursorMoved(Message):
        """Another step is read."""

    def __init__(self, empty: str = "", count: int = 6, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.empty, self.count = empty, count
        self.figures = figures_of(RunModel())
        self.marks: list[Mark] = []
        self.saved: list[Mark] = []
        self.chosen = 0
        self.title_index = 0
        """Where one chart shows all figures in turn: which."""
        self.title = ""
        """Before the name of the figure."""
        self.pinned = False
        """Whether the cursor was set by a key and stays when the mouse leaves."""

    def compose(self) -> ComposeResult:
        for index in range(self.count):
            panel = Vertical(id="chart-panel" if index == 0 else f"chart-panel-{index}", classes="panel chart-panel")
            with panel:
                yield Pane(id="legend" if index == 0 else f"legend-{index}", classes="legend")
                yield Chart(
                    self.figures[index].series, empty=self.empty, id="chart" if index == 0 else f"chart-{index}"
                )

    def on_mount(self) -> None:
        self.lay_out()

    def on_resize(self) -> None:
        self.lay_out()

    @property
    def charts(self) -> list[Chart]:
        return list(self.query(Chart))

    @property
    def first(self) -> Chart:
        """Its view and cursor are those of all."""
        return self.query_one("#chart", Chart)

    @property
    def many(self) -> bool:
        """Whether all figures are shown."""
        return self.count > 1 and self.size.width >= MANY[0] and self.size.height >= MANY[1]

    def lay_out(self) -> None:
        """One chart or all, as there is room."""
        self.set_class(self.many, "-many")
        for index, panel in enumerate(self.query(".chart-panel")):
            panel.display = self.many or index == self.chosen
        self.show_legends()

    def show(
        self, figures: list[Figure], marks: list[Mark], saved: list[Mark], empty: str = "", live: bool = False
    ) -> None:
        """New points."""
        self.figures, self.marks, self.saved = figures, marks, saved
        span = extent_of([series for figure in figures for series in figure.series])
        for index, chart in enumerate(self.charts):
            chart.series, chart.span = figures[index].series if index < len(figures) else [], span
            chart.marks, chart.checkpoints, chart.live = marks, saved, live
            if empty:
                chart.empty = empty if index == 0 else NOT_MEASURED
            chart.redraw()
        self.show_legends()

    def next_figure(self) -> None:
        """The next one that has points."""
        known = [i for i, figure in enumerate(self.figures) if any(s.xs for s in figure.series)]
        later = [i for i in known if i > self.chosen]
        self.chosen = (later or known or [0])[0]
        self.lay_out()

    # --- the view ----------------------------------------------------------------------------------------------------

    def zoom(self, factor: float, about: float | None = None) -> None:
        """All charts."""
        chart = self.charts[self.chosen if not self.many else 0]
        chart.zoom(factor, chart.cursor if about is None else about)
        self._share(chart)

    def pan(self, share: float) -> None:
        """All charts."""
        chart = self.charts[self.chosen if not self.many else 0]
        chart.pan(share)
        self._share(chart)

    def whole(self) -> None:
        """All charts whole, and no cursor."""
        self.first.window, self.pinned = None, False
        self._share(self.first)
        self.set_cursor(None)

    def toggle_log(self) -> None:
        """The loss, or the figure that is shown."""
        self.charts[0 if self.many else self.chosen].toggle_log()
        self.show_legends()

    def _share(self, from_chart: Chart) -> None:
        for chart in self.charts:
            chart.window = from_chart.window
            chart.redraw()
        self.show_legends()

    def set_cursor(self, x: float | None) -> None:
        """Reads the values at a step in all charts."""
        if x == self.first.cursor:
            return
        for chart in self.charts:
            chart.cursor = x
            chart.redraw()
        self.show_legends()
        self.post_message(self.CursorMoved())

    def move_cursor(self, by: int) -> None:
        """To the point before or after, of the first line that has any."""
        chart = self.charts[0 if self.many else self.chosen]
        xs = next((series.xs for series in chart.series if series.xs), None)
        if xs is None:
            return
        x0, x1 = chart.view() or (xs[0], xs[-1])
        inside = [x for x in xs if x0 <= x <= x1] or xs
        stride = max(1, len(inside) // max(1, chart.size.width))  # a column at a time
        at = chart.cursor
        if at is None:
            target = len(inside) - 1 if by < 0 else 0
        else:
            nearest = min(range(len(inside)), key=lambda i: abs(inside[i] - at))
            target = max(0, min(len(inside) - 1, nearest + by * stride))
        self.pinned = True
        self.set_cursor(inside[target])

    def go_to_step(self, step: float) -> None:
        """The cursor to a step, which comes into view."""
        window = self.first.window
        if window and not window[0] <= step <= window[1]:
            half = (window[1] - window[0]) / 2
            self.first.window = (step - half, step + half)
            self._share(self.first)
        self.pinned = True
        self.set_cursor(step)

    @on(Chart.Pointed)
    def _pointed(self, event: Chart.Pointed) -> None:
        event.stop()
        if event.x is not None:
            series = next((s for s in self.charts[0 if self.many else self.chosen].series if s.xs), None)
            near = series.near(event.x) if series else None
            self.pinned = False
            self.set_cursor(near[0] if near else event.x)
        elif not self.pinned:
            self.set_cursor(None)

    @on(Chart.Wheel)
    def _wheel(self, event: Chart.Wheel) -> None:
        event.stop()
        self.zoom(event.factor, event.about)

    # --- legends -----------------------------------------------------------------------------------------------------

    def show_legends(self) -> None:
        """The newest values, or those at the cursor, and what is marked there."""
        for index, (panel, legend, chart) in enumerate(
            zip(self.query(".chart-panel"), self.query(".legend"), self.charts)
        ):
            figure = self.figures[index] if index < len(self.figures) else None
            named = figure.title if figure else "loss"
            set_title(panel, f"{named} · {self.title}" if self.title else named)
            scale = "log" if chart.logarithmic else "linear"
            set_subtitle(panel, f"{scale} · {'zoomed · 0 whole run' if chart.window else 'whole run'}")
            assert isinstance(legend, Pane)
            legend.show(self._legend(figure, chart) if figure else Content(""))

    def _legend(self, figure: Figure, chart: Chart) -> Content:
        at = chart.cursor
        parts = [] if at is None else [Content.assemble(("step ", "$muted"), (f"{at:,.6g}", "bold"))]
        for series in figure.series:
            near = None if at is None else series.near(at)
            value = near[1] if near else series.last()
            if not series.xs:
                continue
            text = "–" if value is None or value != value else f"{value:.6g}" if near else tick_text(value)
            where = f" at {near[0]:,.6g}" if near and near[0] != at else ""
            parts.append(
                Content.assemble(
                    ("● ", STYLES.get(series.component, "")), f"{series.name} ", (text, "bold"), (where, "$muted")
                )
            )
        if at is not None and chart.extent():
            x0, x1 = chart.view() or (at, at)
            reach = (x1 - x0) / max(10, chart.size.width)
            named = [mark.text for mark in [*self.marks, *self.saved] if abs(mark.x - at) <= reach]
            parts += [Content.assemble((text, "$warning")) for text in dict.fromkeys(named)]
        return Content("   ").join(parts)
