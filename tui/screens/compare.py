"""Two or three runs beside each other: their curves in one chart, their figures, the settings in which they differ."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Vertical, VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Static

from surgvqa.runs.events import finished_event
from surgvqa.runs.history import RunSummary
from surgvqa.runs.state import read_run_json
from tui import keys, words
from tui.content.outcome import beside, differences, outcome, score
from tui.content.report import lines, waiting
from tui.follow.follower import Follower
from tui.follow.run_model import RunModel
from tui.follow.series import Series
from tui.session import Session
from tui.widgets.charts import STYLES, Charts, Figure, figures_of
from tui.widgets.filtered import Filtered
from tui.widgets.keys import Keys
from tui.widgets.pane import Pane

COLOURS = ("chart--train", "chart--eval", "chart--third")


class CompareTable(Filtered, VerticalScroll, can_focus=True):
    """Figures and settings of the runs; the filter is by a row's name and values."""

    BINDINGS: ClassVar[list[BindingType]] = keys.bindings("list")
    sorts = ("name", "value")

    def on_mount(self) -> None:
        self.redraw()

    def redraw(self) -> None:
        if isinstance(self.screen, CompareScreen):
            self.screen.show_table()


class CompareScreen(ModalScreen[None]):
    """Follows the compared runs as Monitor follows one."""

    BINDINGS: ClassVar[list[BindingType]] = keys.bindings("compare")

    def __init__(self, session: Session, runs: list[RunSummary]) -> None:
        super().__init__()
        self.session, self.runs = session, runs
        self.followers: list[Follower] = [session.follow(session.target, run.id) for run in runs]
        self.everything = False
        self.evaluations: list[dict[str, Any]] = [{} for _ in runs]
        """The newest evaluation of each training, as far as one lies here."""

    def compose(self) -> ComposeResult:
        with Vertical(id="compare"):
            yield Static("", id="compare-title", markup=False)
            yield Charts("None of these runs has a loss.", count=1, id="charts")
            with CompareTable(id="compare-table", classes="panel") as table:
                yield Pane(id="compare-text")
            yield table.search
            yield Keys(show_command_palette=False)

    async def on_mount(self) -> None:
        self.query_one("#compare-table").focus()
        if self.session.host is None:
            self.evaluations = [newest_evaluation(self.session.listed_here, run) for run in self.runs]
        await self.look()
        self.set_interval(1.0, self.look)

    async def look(self) -> None:
        """Reads what is new of each run and draws it."""
        for follower in self.followers:
            await follower.poll()
        names = [name_of(run) for run in self.runs]
        self.query_one("#compare-title", Static).update(Content.assemble(("compare  ", "bold"), "  ".join(names)))
        self.query_one(Charts).show(self._figures(), [], [])
        self.show_table()

    def show_table(self) -> None:
        """The table, as its filter and order have it."""
        self.query_one("#compare-text", Pane).show(self._table)

    def _figures(self) -> list[Figure]:
        charts = self.query_one(Charts)
        models = [follower.model for follower in self.followers]
        all_figures = [figures_of(model) for model in models]
        chosen = charts.title_index % len(all_figures[0]) if all_figures else 0
        series: list[Series] = []
        for run, figures, colour in zip(self.runs, all_figures, COLOURS):
            for one in figures[chosen].series:
                name = f"{words.clip(name_of(run), 20)}{' eval' if one.name == 'eval' else ''}"
                series.append(replace(one, component=colour, name=name, smooth_only=True))
        return [Figure(all_figures[0][chosen].title if all_figures else "", series)]

    def _table(self, width: int) -> Content:
        models = [follower.model for follower in self.followers]
        titles = [
            Content.assemble(("● ", STYLES[colour]), (name_of(run), "bold")) for run, colour in zip(self.runs, COLOURS)
        ]
        rows = [("state", [follower.state for follower in self.followers]), *self._figures_of(models)]
        table, settings = self.query_one(CompareTable), differences(models, self.everything)
        shown = [row for row in settings if table.passes(" ".join([row[0], *row[1]]))]
        table.show_filter(len(shown), len(settings))
        if table.sort == "value":
            shown.sort(key=lambda row: row[1])
        heading = "all settings" if self.everything else "settings that differ"
        return lines(
            *beside(titles, rows, width),
            "",
            Content.assemble((heading, "bold $primary")),
            *(beside([], shown, width) or [waiting("none with that" if settings else "none: they were started alike")]),
        )

    def _figures_of(self, models: list[RunModel]) -> list[tuple[str, list[str]]]:
        found = [dict(outcome(model, self.session.target.price_per_hour)) for model in models]
        for figures, evaluation in zip(found, self.evaluations):
            if evaluation:
                figures["keyword accuracy"] = score(evaluation, "keyword_accuracy", "keyword_interval")
                figures["majority"] = score(evaluation, "majority_accuracy", "")
        names = dict.fromkeys(name for figures in found for name in figures)
        return [(name, [figures.get(name, "") for figures in found]) for name in names]

    # --- what the keys do --------------------------------------------------------------------------------------------

    def action_metric(self) -> None:
        charts = self.query_one(Charts)
        charts.title_index += 1
        charts.show(self._figures(), [], [])

    def action_log_scale(self) -> None:
        self.query_one(Charts).toggle_log()

    def action_cursor(self, by: int) -> None:
        self.query_one(Charts).move_cursor(by)

    def action_all_settings(self) -> None:
        self.everything = not self.everything
        self.show_table()

    def action_leave(self) -> None:
        self.dismiss()


def name_of(run: RunSummary) -> str:
    """The run's name with the end of its id, which tells runs of one name apart."""
    part = run.id.rsplit("-", 1)[-1]
    return f"{run.name} {part}" if run.name else run.id


def newest_evaluation(listed: list[RunSummary], run: RunSummary) -> dict[str, Any]:
    """The result of the newest evaluation of a training's checkpoint; {} when there is none."""
    for other in listed:
        if other.command != "evaluate" or other.state != "finished":
            continue
        judged = (read_run_json(other.folder).get("options") or {}).get("checkpoint") or {}
        if run.id in str(judged.get("value") if isinstance(judged, dict) else judged).split("/"):
            result = (finished_event(other.folder) or {}).get("result")
            return result if isinstance(result, dict) else {}
    return {}
