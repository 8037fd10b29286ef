"""Monitor: the runs of this machine or of a host, and one of them live: charts, memory, pace, timeline."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.widgets import ContentSwitcher, OptionList

from tui import keys, words
from tui.content import report, scores
from tui.content.facts import facts, facts_alone, facts_in_two_lines
from tui.content.source import output_around, source_line
from tui.dialogs.entry import EntryDialog
from tui.follow.follower import Follower
from tui.follow.run_model import RunModel
from tui.follow.timeline import ERROR, OUTPUT, Entry
from tui.screens.base import WIDE
from tui.screens.compare import CompareScreen
from tui.screens.run_keys import RunKeys
from tui.session import Session
from tui.targets.target import newest_running
from tui.widgets.charts import Charts, figures_of
from tui.widgets.gauge import Gauge
from tui.widgets.pane import Pane
from tui.widgets.run_list import RunList
from tui.widgets.search import Search
from tui.widgets.timeline_panel import TimelinePanel
from tui.widgets.timeline_view import TimelineView
from tui.widgets.titles import set_subtitle, set_title

NO_RUNS = "No runs yet.\nMerge with 1, then start training with 3.\nRuns appear here automatically."
NO_RUNS_THERE = "No runs on {host} yet.\nSend checkpoint and data with 2, then start training with 3."
FIRST_LOSS = "The first loss comes with the first optimiser step."


class MonitorScreen(RunKeys):
    """Run list, figures and memory beside the charts and the timeline."""

    MODE = "monitor"
    ABOUT = (
        "Follows a run through its folder: closing the panel, or losing the terminal, never touches the job; open it "
        "again and it goes on from the same files. Choose a run in the list and press Enter to follow it; Space marks "
        "runs, d compares them. Tab goes from the list to the timeline."
    )
    BINDINGS: ClassVar[list[BindingType]] = keys.bindings("monitor")

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.shown_target = self.session.target
        self.kept: dict[str, Follower] = {}
        """What is followed on the other machines, by their names."""
        self.drawn: tuple[object, ...] = ()
        """Run and version of what the figures show."""

    def body(self) -> ComposeResult:
        with Horizontal(id="monitor"):
            with Vertical(id="side"):
                runs = RunList(id="runs", classes="panel")
                yield runs
                yield runs.search
                yield Pane(id="facts", classes="panel")
                with VerticalScroll(id="memory-panel", classes="panel", can_focus=False):
                    yield Gauge(id="gauge")
            with Vertical(id="main"):
                with ContentSwitcher(initial="charts", id="picture"):
                    yield Charts(NO_RUNS, id="charts")
                    with VerticalScroll(id="text-panel", classes="panel", can_focus=True):
                        yield Pane(id="text")
                yield TimelinePanel(id="timeline-panel", classes="panel")

    def next_launch(self) -> list[tuple[str, str]]:
        """Nothing: here the run's own preset and budget count."""
        return []

    async def on_mount(self) -> None:
        for id, title in {"runs": "runs", "memory-panel": "memory", "facts": "run"}.items():
            set_title(self.query_one(f"#{id}"), title)
        if self.follower is None:
            self.attach_newest()
        self.show_list()
        self.query_one(RunList).focus()

    def on_resize(self) -> None:
        super().on_resize()
        self.call_after_refresh(self._resized)

    def _resized(self) -> None:
        """Narrow and wide show other things; the list, where it is back, has the keys again."""
        self.show_figures()
        runs = self.query_one(RunList)
        if self.focused is None and runs.focusable and self.app.size.width >= WIDE:
            runs.focus()

    # --- attaching and following -------------------------------------------------------------------------------------

    def attach_newest(self) -> None:
        """The newest run that is going, else the newest; without any, what to do."""
        if self.session.listed:
            self.attach((newest_running(self.session.listed) or self.session.listed[0]).id)
        else:
            self.query_one(Charts).show(figures_of(RunModel()), [], [], self.no_runs())

    def no_runs(self) -> str:
        """What an empty list means."""
        host = self.session.host
        if host is None:
            return NO_RUNS
        if host.link.listed is None:
            return f"{host.name}: {host.connection.kind}\n{host.connection.text.removeprefix(f'{host.name}: ')}"
        return NO_RUNS_THERE.format(host=host.name)

    def attach(self, run_id: str) -> None:
        """Follows this run from its first event."""
        old, target = self.follower, self.session.target
        if old is not None and (old.target, old.run_id) == (target, run_id):
            return
        if old is not None and old.target is target and not old.active:
            self.session.forget(old)
        self.show_follower(self.session.follow(target, run_id))

    def show_follower(self, follower: Follower | None) -> None:
        """Puts a run on the screen; None: there is none."""
        self.follower, self.drawn = follower, ()
        self.say("")
        if not self.is_mounted:
            return
        charts = self.query_one(Charts)
        charts.whole()
        charts.title = ""
        model = follower.model if follower else RunModel()
        charts.show(figures_of(model), model.marks, model.saved, FIRST_LOSS if follower else self.no_runs())
        if follower is None:
            self.query_one("#picture", ContentSwitcher).current = "charts"
            for pane in ("#facts", "#text"):
                self.query_one(pane, Pane).show(Content(""))
            self.query_one(Gauge).show_devices({}, 0.0)
            set_title(self.query_one("#facts"), "run")
        self.show_list()
        runs = self.query_one(RunList)
        if follower and follower.run_id in {option.id for option in runs.options}:
            runs.highlighted = runs.get_option_index(follower.run_id)
        work: Callable[[], Any] = self.tick
        self.run_worker(work, group="attach", exclusive=True, exit_on_error=False)

    def change_target(self) -> None:
        """Another machine was chosen: what was followed there goes on, and this is kept meanwhile."""
        if self.follower is not None:
            self.kept[self.shown_target.name] = self.follower
        self.shown_target = self.session.target
        self.show_follower(self.kept.pop(self.session.target.name, None))

    async def tick(self) -> None:
        if self.shown_target is not self.session.target:
            self.change_target()
            return
        self.show_list()
        follower = self.follower
        if follower is None:
            self.attach_newest()
            return
        await follower.poll()
        if self.follower is not follower:
            return
        drawn = (follower, follower.version)
        if drawn == self.drawn:
            if follower.active:
                self.show_facts()  # the clock goes on
                self.show_memory()
            return
        self.drawn = drawn
        self.query_one(TimelinePanel).show(follower.timeline)
        self.show_figures()
        self.keys_changed()

    # --- drawing -----------------------------------------------------------------------------------------------------

    def show_figures(self) -> None:
        """Chart or report, the run's facts, its memory."""
        self.show_facts()
        self.show_picture()
        self.show_memory()

    def show_list(self) -> None:
        """The run list, when it changed."""
        self.query_one(RunList).show_runs(self.session.shown_runs(), self.follower.run_id if self.follower else None)

    def show_facts(self) -> None:
        """Phase, step, pace, time left; or how it ended, what came of it, and what to do."""
        follower = self.follower
        if follower is None:
            return
        name = str(follower.model.option("run_name") or follower.run_id)
        panel = self.query_one("#facts", Pane)
        set_title(panel, words.clip(name, 36))
        narrow = self.app.size.width < WIDE
        self.query_one(Charts).title = words.clip(name, 36) if narrow else ""
        draw = facts_alone if self.has_class("-small") else facts_in_two_lines if narrow else facts
        resumable = self.resumable()
        panel.show(lambda width: draw(follower, max(20, width), resumable))

    def show_picture(self) -> None:
        """The charts; bars for an evaluation; phases and report for a merge."""
        follower = self.follower
        if follower is None:
            return
        model = follower.model
        curve = model.command == "train" or bool(model.train.xs)
        self.query_one("#picture", ContentSwitcher).current = "charts" if curve else "text-panel"
        if curve:
            self.query_one(Charts).show(figures_of(model), model.marks, model.saved, FIRST_LOSS, follower.active)
            return
        set_title(self.query_one("#text-panel"), model.command or "job")
        self.query_one("#text", Pane).show(partial(self._report, follower))

    @staticmethod
    def _report(follower: Follower, width: int) -> Content:
        if follower.active:
            return report.job_progress(follower, width)
        result = follower.model.result
        return scores.evaluation(result, width) if result.get("by_type") else report.job_end(follower)

    def show_memory(self) -> None:
        """The gauge against the run's own budget."""
        follower = self.follower
        if follower is None:
            return
        age = follower.silent_s
        set_subtitle(self.query_one("#memory-panel"), "" if age is None else f"{words.seconds(age)} old")
        self.query_one(Gauge).set_class(age is not None, "-old")
        budget = follower.model.option("budget_gb")
        self.query_one(Gauge).show_devices(
            follower.model.devices,
            float(budget) * words.GB if isinstance(budget, (int, float)) else 0.0,
            follower.model.predicted,
            compact=self.app.size.width < WIDE,
            fit=follower.model.fit,
            hosts=follower.model.hosts,
            waits=follower.model.rank_waits,
        )

    # --- what the keys do --------------------------------------------------------------------------------------------

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        follower = self.follower
        if not self.is_mounted:
            return super().check_action(action, parameters)
        runs = self.query_one(RunList)
        if action == "attach":
            option = runs.highlighted_option
            return bool(option and (follower is None or option.id != follower.run_id))
        if action == "compare":
            return len(runs.marked) > 1
        if action in ("log_scale", "zoom", "pan", "whole", "cursor", "metric"):
            return bool(follower and follower.model.train.xs) and not isinstance(self.focused, Search)
        if action == "follow_end":
            return not self.query_one(TimelineView).following
        if action in ("search_again", "level", "wrap", "copy", "timeline"):
            return bool(follower and follower.timeline.entries)
        return super().check_action(action, parameters)

    @on(OptionList.OptionHighlighted)
    def _highlighted(self) -> None:
        self.keys_changed()

    @on(OptionList.OptionSelected)
    def _selected(self, event: OptionList.OptionSelected) -> None:
        self.remove_class("-list")
        self.attach(str(event.option.id))

    def action_attach(self) -> None:
        self.query_one(RunList).action_select()

    def action_runs(self) -> None:
        """To the list; where there is no room for it, it takes the place of the chart and back."""
        self.toggle_class("-list")
        self.query_one(RunList).focus()

    def action_timeline(self) -> None:
        """To the timeline; where there is no room for it, it takes the place of the chart and back."""
        self.toggle_class("-timeline")
        self.query_one(TimelineView).focus()

    def action_compare(self) -> None:
        """The marked runs beside each other."""
        marked = self.query_one(RunList).marked
        listed = [run for id in marked for run in self.session.listed if run.id == id]
        self.app.push_screen(CompareScreen(self.session, listed))

    def action_log_scale(self) -> None:
        self.query_one(Charts).toggle_log()

    def action_metric(self) -> None:
        self.query_one(Charts).next_figure()

    def action_zoom(self, factor: float) -> None:
        self.query_one(Charts).zoom(factor)

    def action_pan(self, share: float) -> None:
        self.query_one(Charts).pan(share)

    def action_cursor(self, by: int) -> None:
        self.query_one(Charts).move_cursor(by)

    def action_whole(self) -> None:
        self.query_one(Charts).whole()

    def action_follow_end(self) -> None:
        self.query_one(TimelineView).follow()
        self._timeline_changed()

    def action_level(self) -> None:
        self.say(f"timeline: {self.query_one(TimelineView).next_level()}")
        self._timeline_changed()

    def action_wrap(self) -> None:
        self.query_one(TimelineView).toggle_wrap()
        self._timeline_changed()

    def _timeline_changed(self) -> None:
        self.query_one(TimelinePanel).show_subtitle()
        self.keys_changed()

    def action_search(self) -> None:
        """In the timeline; the run list has a filter of its own."""
        self.query_one(TimelinePanel).ask()

    def action_search_again(self, by: int) -> None:
        self.query_one(TimelinePanel).find("", by)
        self.keys_changed()

    @on(TimelinePanel.Found)
    def _found(self, event: TimelinePanel.Found) -> None:
        if event.entries:
            self.say(f"{event.entries:,} with {event.sought!r}; n goes to the next")
        else:
            self.say(f"no entry of the timeline holds {event.sought!r}", "warning")

    def action_copy(self) -> None:
        """Through the terminal (OSC 52), in base64: no sequence in it is obeyed."""
        entry = self.query_one(TimelineView).entry
        if entry:
            self.app.copy_to_clipboard(entry.text)
            self.say(f"copied: {words.clip(entry.text, 60)}")

    @on(TimelineView.Moved)
    def _moved(self, event: TimelineView.Moved) -> None:
        self._timeline_changed()

    @on(TimelineView.Opened)
    def _opened(self, event: TimelineView.Opened) -> None:
        """The chart's cursor goes there; an error or a warning opens, with the output around it."""
        entry, follower = event.entry, self.follower
        if follower is None:
            return
        if entry.step is not None and follower.model.train.xs:
            self.query_one(Charts).go_to_step(entry.step)
        if entry.level in (ERROR, "warning", OUTPUT) or entry.step is None:
            self._open(entry, follower)

    def _open(self, entry: Entry, follower: Follower) -> None:
        same, lines = output_around(follower.timeline.entries, entry)
        if same is not None and same is not entry:
            self.query_one(TimelineView).go_to_entry(same)
        parts = [("what the process wrote", "\n".join(line.text for line in lines))] if lines else []
        found = source_line(entry.text, self.workspace_root if self.session.host is None else None)
        parts += [found] if found else []
        step = "" if entry.step is None else f" at step {entry.step:,}"
        self.app.push_screen(EntryDialog(f"{entry.level}{step}", entry.text, parts))
