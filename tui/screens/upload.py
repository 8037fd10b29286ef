"""Upload: what a GPU host needs, the cheapest way to send it, and the job that does."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import VerticalScroll
from textual.content import Content

from surgvqa.errors import SurgvqaError
from surgvqa.runs.state import read_run_json
from tui import keys, words
from tui.content import report
from tui.dialogs.confirm import Confirm, when_yes
from tui.follow.follower import Follower
from tui.screens.base import PanelScreen
from tui.session import Session
from tui.settings.upload_plan import PlanRow, file_plan
from tui.targets.target import ACTIVE
from tui.targets.threads import in_thread, watched
from tui.widgets.pane import Pane
from tui.widgets.titles import set_title

WHAT, FILES, SIZE = 20, 8, 11  # widths of the plan's columns; the path takes the rest

NO_HOST = (
    "No host is set: everything runs on this machine. h chooses a GPU host.\n"
    'To begin there always, put  host = "NAME"  into {file} (a name of ~/.ssh/config or hosts.toml).'
)

if TYPE_CHECKING:
    from tui.targets.host import HostTarget

JOBS = ("upload", "setup", "rent", "end")


class UploadScreen(PanelScreen):
    """The host, the plan, and the upload or setup at work."""

    MODE = "upload"
    ABOUT = (
        "Compares the ways to have checkpoint and data on the host, by what it lacks; u accepts and sends. The upload "
        "is a process of its own: it goes on when the panel is closed, and begins again where it was broken off."
    )
    BINDINGS: ClassVar[list[BindingType]] = keys.bindings("upload")

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.host: HostTarget | None = None
        """That this screen shows; None: this machine."""
        self.what = "auto"
        self.plan: dict[str, Any] | None = None
        self.planning = self.planned = False
        self.follower: Follower | None = None

    def body(self) -> ComposeResult:
        with VerticalScroll(id="upload", can_focus=True):
            yield Pane(id="host-text", classes="panel")
            yield Pane(id="plan-text", classes="panel")
            yield Pane(id="job-text", classes="panel")

    def on_mount(self) -> None:
        for id, title in {"host-text": "host", "plan-text": "what it needs"}.items():
            set_title(self.query_one(f"#{id}"), title)
        self.change_host()
        self.query_one("#upload").focus()

    # --- the host ----------------------------------------------------------------------------------------------------

    def change_host(self) -> None:
        """Another host was chosen: its plan, and what is being done for it."""
        self.host = self.session.host
        self.what, self.plan, self.planned, self.follower = "auto", None, False, None
        self.find_job()
        self.show_host()
        self.show_job()
        self.action_plan()

    def find_job(self) -> None:
        """What is being done for the host, whoever has started it."""
        for run in self.session.listed_here if self.host else []:
            at_work = run.command in JOBS and run.state in ACTIVE
            if self.host and at_work and _host_of(read_run_json(run.folder)) == self.host.name:
                self.follower = Follower(self.session.here, run.id)
                return

    def follow_job(self, run_id: str) -> None:
        """Shows a job of this machine that was just started."""
        self.follower = Follower(self.session.here, run_id)
        self.keys_changed()
        self.call_after_refresh(self.query_one("#job-text").scroll_visible, animate=False)

    async def tick(self) -> None:
        if self.host is not self.session.host:
            self.change_host()
        host = self.host
        self.show_host()
        if host and host.connection.kind == "connected" and not self.planned and not self.planning and not self.working:
            self.action_plan()
        if not self.working:  # a machine that was rented is set up, then sent to, by one process
            self.find_job()
        follower = self.follower
        if follower is None:
            return
        was_active = follower.active
        await follower.poll()
        if self.follower is not follower:
            return
        self.show_job()
        if was_active and not follower.active:
            self.keys_changed()
            self._job_ended(follower)

    @work(group="ended", exit_on_error=False)
    async def _job_ended(self, follower: Follower) -> None:
        if self.host and follower.model.command == "setup":
            try:
                await in_thread(self.host.link.probe)
            except SurgvqaError as error:
                self.say(str(error), "error")
        self.show_host()
        self.keys_changed()
        self.action_plan()

    @property
    def working(self) -> bool:
        """Whether an upload or a setup for this host is at work."""
        return self.follower is not None and self.follower.active

    def show_host(self) -> None:
        """Where it is, what it has, and whether it has this version of us."""
        host, panel = self.host, self.query_one("#host-text", Pane)
        if host is None:
            panel.show(Content(NO_HOST.format(file=self.session.here.workspace.file.name)))
            return
        rows: list[Content | str] = [
            words.connection(host.name, host.connection, max(30, panel.size.width - len(host.name) - 2))
        ]
        facts, reached = host.link.facts, host.link.host
        if reached:
            at = f"{reached.user}@{reached.hostname}:{reached.port}"
            entry = reached.entry
            price = "" if entry.price_per_hour is None else words.price(entry.price_per_hour, " per hour")
            rows.append(report.waiting("  ·  ".join(part for part in (at, entry.gpus, price) if part)))
        if host.connection.kind == "refused":
            rows.append(report.key_hints(("h", "tries it again, or chooses another")))
        elif host.connection.kind == "unreachable":
            rows += [report.waiting(host.connection.text), report.waiting("tried again by itself until it answers")]
        elif host.connection.kind == "unknown key":
            rows.append(report.waiting(host.connection.text))
        elif facts:
            free = f"{words.size(facts['free'])} free"
            rows.append(report.waiting(f"{facts['workspace']}  ·  {free}  ·  Python {facts['python_version']}"))
            if host.skew:
                rows.append(Content.assemble((f"! {host.skew}: ", "$warning"), ("v", "bold $accent"), " sets it up"))
        panel.show(report.lines(*rows))

    # --- the plan ----------------------------------------------------------------------------------------------------

    @work(group="plan", exclusive=True, exit_on_error=False)
    async def action_plan(self) -> None:
        """Reads the files in a thread; on a host also asks what it has."""
        host, panel = self.host, self.query_one("#plan-text", Pane)
        asked = host is not None and host.connection.kind == "connected"
        self.planning, self.planned, self.plan = True, asked, None
        self.keys_changed()
        panel.show(report.waiting("reading the files …"))
        try:
            if host is None or not asked:
                items = await in_thread(file_plan, self.session.here.workspace, self.session.checkpoint)
                panel.show(partial(self.table, items) if items else Content(NOTHING))
                return
            await self._plan_for(host, panel)
        except (OSError, SurgvqaError) as error:
            hint = "w plans without a checkpoint, p reads the files again" if asked and self.what != "data" else ""
            panel.show(report.lines(report.problem(str(error)), report.waiting(hint)))
        finally:
            self.planning = False
            self.keys_changed()

    async def _plan_for(self, host: HostTarget, panel: Pane) -> None:
        ask = partial(host.plan, self.what, self.session.checkpoint)
        plan = await watched(ask, lambda line: panel.show(report.waiting(line)))
        if self.host is host:
            self.plan = plan
            self.show_plan()

    def show_plan(self) -> None:
        """Each way with what it would send and how long that takes; the marked one is what u does."""
        if self.plan:
            drawing = partial(report.upload_plan, self.plan, self.marked)
            self.query_one("#plan-text", Pane).show(lambda width: drawing(max(40, width)))

    @property
    def marked(self) -> str:
        """The way that u takes: merged, adapter or data."""
        return self.what if self.what != "auto" or self.plan is None else self.plan["chosen"] or "data"

    def table(self, items: list[PlanRow], width: int) -> Content:
        """The files, a row an item, as wide as the screen."""
        width = max(40, width)
        where = width - WHAT - FILES - SIZE
        muted = "$muted"
        lines = [Content.assemble((f"{'what':<{WHAT}}{'where':<{where}}{'files':>{FILES}}{'size':>{SIZE}}", muted))]
        for item in items:
            path = words.clip(words.short_path(item.path, self.workspace_root), where - 1, keep_end=True)
            files, size = (f"{item.files:,}", words.size(item.bytes)) if item.files else ("–", "–")
            lines.append(
                Content.assemble(f"{item.what:<{WHAT}}", (f"{path:<{where}}", muted), f"{files:>{FILES}}{size:>{SIZE}}")
            )
            if item.problem:
                lines.append(Content.assemble((f"  {item.problem}", "$warning")))
        merged = sum(i.bytes for i in items if i.what == "merged checkpoint")
        adapter = sum(i.bytes for i in items if i.what == "Stage-2 adapter")
        data = sum(i.bytes for i in items) - merged - adapter
        lines.append(Content(""))
        for label, part in (("sending the merged checkpoint", merged), ("sending the adapter, merging there", adapter)):
            total = words.size(part + data) if part else "–"
            lines.append(Content.assemble((f"{label:<{width - SIZE}}{total:>{SIZE}}", "bold")))
        return Content("\n").join(lines)

    # --- the job -----------------------------------------------------------------------------------------------------

    def show_job(self) -> None:
        """The upload or setup at work, or how the last one ended."""
        panel, follower = self.query_one("#job-text", Pane), self.follower
        panel.display = follower is not None
        if follower is None:
            return
        set_title(panel, follower.model.command or "job")
        width = max(40, panel.size.width)
        if not follower.active:
            panel.show(report.remote_end(follower))
        elif follower.model.command == "upload":
            panel.show(report.upload_progress(follower, width))
        else:
            panel.show(report.setup_progress(follower, width))

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        reached = self.host is not None and self.host.connection.kind == "connected"
        if action == "stop":
            return self.working
        if action == "upload":
            return reached and self.plan is not None and not self.working
        if action == "other_way":
            return reached and self.planned and not self.planning and not self.working
        if action in ("plan", "set_up") and self.working:
            return False
        return super().check_action(action, parameters)

    def action_other_way(self) -> None:
        """The next way that is open; only the data when no checkpoint can be sent."""
        if self.plan is None:
            self.what = "auto" if self.what == "data" else "data"
            self.action_plan()
            return
        ways = [*(way["name"] for way in self.plan["ways"]), "data"]
        self.what = ways[(ways.index(self.marked) + 1) % len(ways)]
        self.show_plan()

    def action_upload(self) -> None:
        host = self.host
        assert host
        checkpoint = self.session.checkpoint
        named = [f"--model_name_or_path={checkpoint}"] if checkpoint else []
        argv = ("upload", host.name, "--what", self.marked, *named)
        self._start(partial(self.session.here.launch, *argv, module="remote"))

    def set_up_host(self) -> None:
        """Installs this version of us on the host; pip's output is shown here."""
        if self.host is not self.session.host:
            self.change_host()
        host = self.host
        if host and not self.working:
            self._start(partial(self.session.here.launch, "setup", host.name, module="remote"))

    @work(group="launch", exit_on_error=False)
    async def _start(self, launch: Callable[[], Awaitable[str]]) -> None:
        run_id = await self.start(launch, "starting …")
        if run_id is None:
            return
        self.follow_job(run_id)
        await self.tick()

    def action_stop(self) -> None:
        """Asks first."""
        follower = self.follower
        if follower is None:
            return
        detail = "What the host has acknowledged is not sent again: the next upload goes on there."
        self.app.push_screen(
            Confirm(f"Stop this {follower.model.command}?", detail, "stop it"),
            when_yes(lambda: self._stop(follower)),
        )

    @work(group="stop", exit_on_error=False)
    async def _stop(self, follower: Follower) -> None:
        if await self.stop_run(follower.run_id, self.session.here):
            self.say(f"{follower.model.command} stopped; the next one goes on there")


NOTHING = (
    "Nothing to send: surgvqa.toml names no checkpoint and no data.\n"
    "Put stage1_model_path, stage2_adapter_path, train_data_path, frames_dir and audio_dir there, then press p."
)


def _host_of(info: dict[str, Any]) -> str | None:
    """The host that a run of surgvqa-remote was for."""
    options = info.get("options") or {}
    entry = options.get("host") or options.get("name")
    return entry.get("value") if isinstance(entry, dict) else None
