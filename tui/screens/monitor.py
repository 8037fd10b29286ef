"""Monitor: the runs of this machine or of a host, and one of them live: loss, memory, pace, log."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.widgets import ContentSwitcher, OptionList
from textual.widgets.option_list import Option

from surgvqa.errors import SurgvqaError
from surgvqa.terminal.figures import counted
from tui import words
from tui.content import report
from tui.content.facts import facts, facts_in_two_lines, run_row
from tui.dialogs.confirm import Confirm, when_yes
from tui.follow.follower import Follower
from tui.follow.run_model import RunModel
from tui.follow.series import Series
from tui.screens.base import WIDE, PanelScreen, RunStarted
from tui.session import Session
from tui.targets.target import newest_running
from tui.targets.threads import watched
from tui.widgets.chart import Chart, tick_text
from tui.widgets.gauge import Gauge
from tui.widgets.log_panel import LogPanel, Search
from tui.widgets.pane import Pane
from tui.widgets.titles import set_subtitle, set_title

NO_RUNS = "No runs yet.\nMerge with 1, then start training with 3.\nWhat runs appears here by itself."
NO_RUNS_THERE = "No runs on {host} yet.\nSend checkpoint and data with 2, then start training with 3."
ZOOM = "Zoom into the newest part, and out"
FIRST_LOSS = "The first loss comes with the first optimiser step."


class MonitorScreen(PanelScreen):
    """Run list, figures and memory beside the chart and the log."""

    MODE = "monitor"
    ABOUT = (
        "Follows a run through its folder: closing the panel, or losing the terminal, never touches the job; open it "
        "again and it goes on from the same files. Choose a run in the list and press Enter to attach to it."
    )
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("s", "stop", "stop", tooltip="Save a checkpoint and end the run"),
        Binding("c", "resume", "continue", tooltip="Go on from the last checkpoint of this run"),
        Binding("e", "evaluate", "evaluate", tooltip="Evaluate this run's adapter on the evaluation samples"),
        Binding("a", "attach", "attach", tooltip="Follow the run chosen in the list"),
        Binding("r", "runs", "runs", tooltip="The run list"),
        Binding("g", "log_scale", "scale", tooltip="Loss on a logarithmic or a linear axis"),
        Binding("plus,equals_sign", "zoom(0.5)", "zoom", key_display="+ −", tooltip=ZOOM),
        Binding("minus", "zoom(2.0)", "zoom", show=False, key_display="+ −", tooltip=ZOOM),
        Binding("left", "pan(-0.25)", "earlier", show=False),
        Binding("right", "pan(0.25)", "later", show=False),
        Binding("0", "whole", "whole run", show=False),
        Binding("o", "way_on", "go on smaller", tooltip="Out of memory: go on from the last checkpoint as proposed"),
        Binding("f", "fetch", "fetch", tooltip="Bring the run's adapters, checkpoints and logs here, verified"),
        Binding("t", "follow_log", "follow log", tooltip="Jump to the end of the log and stay there"),
        Binding("slash", "search", "find", key_display="/", tooltip="Find text in the log"),
        Binding("n", "search_again", "next match", show=False),
    ]

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.follower: Follower | None = None
        self.shown_target = self.session.target
        self.kept: dict[str, Follower] = {}
        """What is followed on the other machines, by their names."""
        self.shown_list: list[object] = []

    def body(self) -> ComposeResult:
        empty = [Series("train", "chart--train")]
        with Horizontal(id="monitor"):
            with Vertical(id="side"):
                yield OptionList(id="runs", classes="panel", markup=False)
                yield Pane(id="facts", classes="panel")
                with VerticalScroll(id="memory-panel", classes="panel", can_focus=False):
                    yield Gauge(id="gauge")
            with Vertical(id="main"):
                with ContentSwitcher(initial="chart-panel", id="picture"):
                    with Vertical(id="chart-panel", classes="panel"):
                        yield Pane(id="legend")
                        yield Chart(empty, empty=NO_RUNS, id="chart")
                    with VerticalScroll(id="text-panel", classes="panel", can_focus=True):
                        yield Pane(id="text")
                yield LogPanel(id="log-panel", classes="panel")

    def next_launch(self) -> list[tuple[str, str]]:
        """Nothing: here the run's own preset and budget count."""
        return []

    async def on_mount(self) -> None:
        titles = {"runs": "runs", "memory-panel": "memory", "chart-panel": "loss", "facts": "run"}
        for id, title in titles.items():
            set_title(self.query_one(f"#{id}"), title)
        if self.follower is None:
            self.attach_newest()
        self.show_list()
        self.query_one(OptionList).focus()

    def on_resize(self) -> None:
        super().on_resize()
        self.call_after_refresh(self._resized)

    def _resized(self) -> None:
        """The panels have their new widths, and the list, where it is back, the keys again."""
        self.show_figures()
        options = self.query_one("#runs", OptionList)
        if self.focused is None and options.focusable and self.app.size.width >= WIDE:
            options.focus()

    # --- attaching and following -------------------------------------------------------------------------------------

    def attach_newest(self) -> None:
        """The newest run that is going, else the newest; without any, what to do."""
        if self.session.listed:
            self.attach((newest_running(self.session.listed) or self.session.listed[0]).id)
        else:
            self.query_one(Chart).empty = self.no_runs()
            self.query_one(Chart).redraw()

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
        if old is not None and old.target is target:
            old.feed.close()
        self.show_follower(Follower(target, run_id))

    def show_follower(self, follower: Follower | None) -> None:
        """Puts a run on the screen; None: there is none."""
        self.follower = follower
        self.say("")
        if not self.is_mounted:
            return
        model = follower.model if follower else RunModel()
        chart = self.query_one(Chart)
        chart.empty = FIRST_LOSS if follower else self.no_runs()
        chart.series, chart.marks, chart.window = [model.train, model.eval], model.marks, None
        chart.redraw()
        self.query_one(LogPanel).clear()
        if follower is None:
            self.query_one("#picture", ContentSwitcher).current = "chart-panel"
            for pane in ("#facts", "#legend"):
                self.query_one(pane, Pane).show(Content(""))
            self.query_one(Gauge).show_devices({}, 0.0)
            set_title(self.query_one("#facts"), "run")
        self.show_list()
        options = self.query_one("#runs", OptionList)
        if follower and follower.run_id in {option.id for option in options.options}:
            options.highlighted = options.get_option_index(follower.run_id)
        work: Callable[[], Any] = partial(self.tick, first=True)
        self.run_worker(work, group="attach", exclusive=True, exit_on_error=False)

    def change_target(self) -> None:
        """Another machine was chosen: what was followed there goes on, and this is kept meanwhile."""
        if self.follower is not None:
            self.kept[self.shown_target.name] = self.follower
        self.shown_target = self.session.target
        self.show_follower(self.kept.pop(self.session.target.name, None))

    async def tick(self, first: bool = False) -> None:
        if self.shown_target is not self.session.target:
            self.change_target()
            return
        self.show_list()
        follower = self.follower
        if follower is None:
            self.attach_newest()
            return
        lines = await follower.poll()
        if self.follower is not follower:
            return
        if lines is None and not first:
            if follower.active:
                self.show_facts()  # the clock goes on
                self.show_memory()
            elif self.query_one("#picture", ContentSwitcher).current == "text-panel":
                self.show_picture()  # at the width that the panel has by now
            return
        chart = self.query_one(Chart)
        chart.series, chart.marks = [follower.model.train, follower.model.eval], follower.model.marks
        chart.empty = FIRST_LOSS
        self.query_one(LogPanel).show(follower.log if first else lines or [])
        self.show_figures()
        self.keys_changed()

    # --- drawing -----------------------------------------------------------------------------------------------------

    def show_figures(self) -> None:
        """Chart or report, the run's facts, its memory."""
        self.show_picture()
        self.show_facts()
        self.show_memory()

    def show_list(self) -> None:
        """The run list, when it changed; the highlight stays on its run."""
        attached = self.follower.run_id if self.follower else None
        shown: list[object] = [attached, *((run.id, run.state, run.name) for run in self.session.listed)]
        if shown == self.shown_list:
            return
        self.shown_list = shown
        options = self.query_one("#runs", OptionList)
        chosen = options.highlighted_option.id if options.highlighted_option else attached
        options.clear_options()
        options.add_options([Option(run_row(run, run.id == attached), id=run.id) for run in self.session.listed])
        if chosen in {run.id for run in self.session.listed}:
            options.highlighted = options.get_option_index(str(chosen))
        set_subtitle(self.query_one("#runs"), f"{len(self.session.listed)}" if self.session.listed else "")

    def show_facts(self) -> None:
        """Phase, step, pace, time left; or how it ended and what to do."""
        follower = self.follower
        if follower is None:
            return
        panel = self.query_one("#facts", Pane)
        name = words.clip(str(follower.model.option("run_name") or follower.run_id), 36)
        set_title(panel, name)
        narrow = self.app.size.width < WIDE
        set_title(self.query_one("#chart-panel"), f"loss · {name}" if narrow else "loss")
        draw, width = (facts_in_two_lines, self.app.size.width - 2) if narrow else (facts, panel.size.width)
        panel.show(draw(follower, max(20, width), self.resumable()))

    def show_picture(self) -> None:
        """The loss curve; bars for an evaluation; phases and report for a merge."""
        follower = self.follower
        if follower is None:
            return
        model = follower.model
        curve = model.command == "train" or bool(model.train.xs)
        switcher, shown = self.query_one("#picture", ContentSwitcher), "chart-panel" if curve else "text-panel"
        if switcher.current != shown:
            switcher.current = shown
            self.call_after_refresh(self.show_picture)  # when the panel that was hidden has its width
        if curve:
            self.show_chart(model)
            return
        panel = self.query_one("#text-panel")
        set_title(panel, model.command or "job")
        width = max(20, panel.size.width - 4)
        if follower.active:
            content = report.job_progress(follower, width)
        elif model.result.get("by_type"):
            content = report.evaluation(model.result, width)
        else:
            content = report.job_end(follower)
        self.query_one("#text", Pane).show(content)

    def show_chart(self, model: RunModel) -> None:
        """Chart and legend."""
        chart = self.query_one(Chart)
        chart.redraw()
        parts: list[Content] = []
        for series, style in ((model.train, "$chart-train"), (model.eval, "$chart-eval")):
            last = series.last()
            if series.xs:
                parts.append(
                    Content.assemble(
                        ("● ", style), f"{series.name} ", (tick_text(last) if last is not None else "–", "bold")
                    )
                )
        scale = "log" if chart.logarithmic else "linear"
        view = "zoomed · 0 whole run" if chart.window else "whole run"
        set_subtitle(self.query_one("#chart-panel"), f"{scale} · {view}")
        self.query_one("#legend", Pane).show(Content("   ").join(parts))

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
        )

    # --- what the keys do --------------------------------------------------------------------------------------------

    def resumable(self) -> bool:
        """Whether a training ended early and left a checkpoint."""
        follower = self.follower
        return bool(
            follower
            and follower.model.command == "train"
            and follower.state in ("stopped", "failed", "died")
            and follower.model.checkpoints
        )

    def way_on(self) -> tuple[str, list[str]] | None:
        """What to go on with after an out-of-memory error that ended the training."""
        follower = self.follower
        ended = follower and follower.model.command == "train" and follower.state in ("failed", "died")
        return follower.model.way_on if follower and ended else None

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        follower = self.follower
        if action == "stop":
            return follower is not None and follower.active
        if action == "resume":
            return self.resumable()
        if action == "way_on":
            return self.way_on() is not None
        if action == "fetch":
            return bool(follower and not follower.active and self.session.host)
        if action == "evaluate":
            return bool(follower and follower.model.command == "train" and follower.state in ("finished", "stopped"))
        if action == "attach":
            option = self.query_one("#runs", OptionList).highlighted_option if self.is_mounted else None
            return bool(option and (follower is None or option.id != follower.run_id))
        if action in ("log_scale", "zoom", "pan", "whole"):
            return bool(follower and follower.model.train.xs) and not isinstance(self.focused, Search)
        if action in ("follow_log", "search", "search_again"):
            return bool(follower and follower.log) and (action != "follow_log" or self.query_one(LogPanel).unseen > 0)
        return super().check_action(action, parameters)

    @on(OptionList.OptionHighlighted)
    def _highlighted(self) -> None:
        self.keys_changed()

    @on(OptionList.OptionSelected)
    def _selected(self, event: OptionList.OptionSelected) -> None:
        self.remove_class("-list")
        self.attach(str(event.option.id))

    def action_attach(self) -> None:
        self.query_one("#runs", OptionList).action_select()

    def action_runs(self) -> None:
        """To the list; where there is no room for it, it takes the place of the chart and back."""
        self.toggle_class("-list")
        self.query_one("#runs", OptionList).focus()

    def action_log_scale(self) -> None:
        self.query_one(Chart).toggle_log()
        self.show_picture()

    def action_zoom(self, factor: float) -> None:
        self.query_one(Chart).zoom(factor)
        self.show_picture()

    def action_pan(self, share: float) -> None:
        self.query_one(Chart).pan(share)

    def action_whole(self) -> None:
        self.query_one(Chart).follow()
        self.show_picture()

    def action_follow_log(self) -> None:
        self.query_one(LogPanel).follow()
        self.keys_changed()

    def action_search(self) -> None:
        self.query_one(LogPanel).ask()

    def action_search_again(self) -> None:
        self.query_one(LogPanel).search()

    @on(LogPanel.Found)
    def _found(self, event: LogPanel.Found) -> None:
        if event.lines:
            self.say(f"{counted(event.lines, 'line')} with {event.sought!r}; n goes to the next")
        else:
            self.say(f"no line of the log holds {event.sought!r}", "warning")

    def action_stop(self) -> None:
        """Asks first."""
        follower = self.follower
        if follower is None:
            return
        detail = f"{follower.run_id}\nIt saves what it has and ends; after 30 s it is ended by force."
        self.app.push_screen(
            Confirm("Stop this run?", detail, "stop it"), when_yes(lambda: self._stop(follower.run_id))
        )

    @work(group="stop", exit_on_error=False)
    async def _stop(self, run_id: str) -> None:
        self.say("stopping: waiting for its checkpoint …")
        state = await self.stop_run(run_id)
        if state:
            self.say(f"{run_id}: {state}", "success" if state in ("stopped", "finished") else "warning")

    def action_resume(self) -> None:
        self._resume("Continue this training")

    def action_way_on(self) -> None:
        """Applies what the out-of-memory error proposed."""
        way_on = self.way_on()
        assert way_on
        self._resume("Go on with this training", *way_on[1])

    def _resume(self, what: str, *changes: str) -> None:
        assert self.follower
        target, run_id = self.session.target, self.follower.run_id
        self.ask_beside(what, lambda share: self._launch(partial(target.resume, run_id, *changes, share=share)))

    def action_evaluate(self) -> None:
        assert self.follower
        launch = partial(self.session.target.launch, "evaluate", "--checkpoint", self.follower.run_id)
        self.ask_beside("Evaluate", lambda share: self._launch(partial(launch, share=share)))

    @work(group="launch", exit_on_error=False)
    async def _launch(self, launch: Callable[[], Awaitable[str]]) -> None:
        run_id = await self.start(launch)
        if run_id:
            self.post_message(RunStarted(run_id))

    @work(group="fetch", exclusive=True, exit_on_error=False)
    async def action_fetch(self) -> None:
        """Brings the run home; what has arrived stays when the panel is closed, and the next fetch goes on there."""
        host, follower = self.session.host, self.follower
        assert host and follower
        try:
            done = await watched(partial(host.fetch, follower.run_id), self.say)
        except (SurgvqaError, OSError) as error:
            self.say(str(error), "error")
            return
        folders = ", ".join(words.short_path(folder, self.workspace_root) for folder in done["folders"])
        self.say(f"fetched {done['files']} files, verified: {folders}", "success")
