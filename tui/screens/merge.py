"""Merge: LoRA adapters and a checkpoint become one BF16 checkpoint. Plan before, progress while, report after."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Vertical, VerticalScroll

from surgvqa.config.options import MergeOptions
from surgvqa.config.settings import settings_of
from tui import keys, words
from tui.content import report
from tui.dialogs.confirm import Confirm, when_yes
from tui.follow.follower import Follower
from tui.screens.base import PanelScreen
from tui.session import Session
from tui.settings.settings import Settings
from tui.targets.target import newest_running
from tui.widgets.form import Field, Form
from tui.widgets.pane import Drawing, Pane
from tui.widgets.titles import set_subtitle, set_title

FIELDS = {
    "stage1_model_path": "Stage-1 checkpoint",
    "stage2_adapter_path": "Stage-2 adapter",
    "output_path": "merged checkpoint",
    "projector": "projector over it",
    "max_shard_size": "largest shard",
    "device": "device",
}


def target_problems(output: Path) -> list[str]:
    """What the merge would say of its output folder, before it starts; [] for a new or an empty one."""
    try:
        if output.is_dir() and not any(output.iterdir()):
            return []
    except OSError as error:
        return [f"{output}: {error.strerror}"]
    if (output / "merge_report.json").is_file():
        return [f"{output.name} holds a merged checkpoint: verified if it is of these inputs, otherwise m is refused"]
    if output.is_dir():
        return [f"{output.name} is not empty and holds something else: m is refused; name another folder"]
    return [f"{output.name} is a file: m is refused; name a folder"] if output.exists() else []


class MergeScreen(PanelScreen):
    """Fields above; below them the plan, then the progress, then the report."""

    MODE = "merge"
    ABOUT = (
        "Adds the Stage-2 LoRA adapter to the Stage-1 checkpoint and writes a full BF16 checkpoint. The plan is a dry "
        "run: sizes and free disk, nothing written. The merge is a job of its own: it goes on when the panel is closed."
    )
    BINDINGS: ClassVar[list[BindingType]] = keys.bindings("merge")

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.settings = Settings("merge", self.session.here.workspace)
        self.session.edited["merge"] = self.settings.edited
        self.follower: Follower | None = None
        self.planning = False

    def body(self) -> ComposeResult:
        known = settings_of(MergeOptions)
        with Vertical(id="merge"):
            with Form(id="merge-form", classes="panel"):
                for name, label in FIELDS.items():
                    is_path = known[name].type.__name__ == "Path_"
                    yield Field(name, label, width=22, is_path=is_path, help=known[name].help)
            with VerticalScroll(id="merge-result", classes="panel", can_focus=True):
                yield Pane(id="merge-text")

    async def on_mount(self) -> None:
        set_title(self.query_one("#merge-form"), "what to merge")
        self.query_one(Form).fill(self.settings, None)
        self.query_one(Form).field("stage1_model_path").focus()
        running = newest_running(self.session.listed_here, "merge")
        if running:
            self.follower = Follower(self.session.here, running.id)
        elif not self.show_finished():
            self.action_plan()

    def reload(self) -> None:
        """surgvqa.toml has other values now."""
        self.query_one(Form).fill(self.settings, None)
        self.action_plan()

    @on(Field.Focused)
    def _focused(self, event: Field.Focused) -> None:
        """What the field is for stands below the fields."""
        form = self.query_one("#merge-form")
        set_subtitle(form, words.clip(event.field.help, max(20, self.app.size.width - 8)))

    # --- plan --------------------------------------------------------------------------------------------------------

    @on(Field.Edited)
    async def _edited(self, event: Field.Edited) -> None:
        if await self.apply_edit(event, self.settings):
            self.query_one(Form).fill(self.settings, None)
            self.action_plan()

    def action_revert(self) -> None:
        field = next((f for f in self.query(Field) if f.has_focus), None)
        if field and self.settings.revert(field.key):
            self.query_one(Form).fill(self.settings, None)
            self.action_plan()

    def action_save_settings(self) -> None:
        if self.save_settings(self.settings, self.settings.workspace.preset):
            self.query_one(Form).fill(self.settings, None)
            self.keys_changed()

    @work(group="plan", exclusive=True, exit_on_error=False)
    async def action_plan(self) -> None:
        """Asks the command itself what it would do."""
        self.follower, self.planning = None, True
        self.say("")
        self.keys_changed()
        self.show("plan", report.waiting("reading the headers …"))
        missing = self.settings.resolve(None)[1]
        if missing:
            labels = " and the ".join(FIELDS[name] for name in missing)
            self.planning = False
            self.show("plan", report.waiting(f"Choose the {labels}: move there with ↑ ↓ and press Enter."))
            return
        try:
            answer = await self.session.here.command(*self.settings.argv(), "--dry_run")
        except OSError as error:
            self.show("plan", report.problem(f"the dry run did not start: {error}"))
            return
        finally:
            self.planning = False
        data = {**answer.data, "warnings": [*target_problems(self.output()), *(answer.data.get("warnings") or [])]}
        self.show("plan", partial(report.merge_plan, data) if answer.data else report.problem(answer.error))

    def show_finished(self) -> bool:
        """Shows the report of the checkpoint that stands at the output path, when one does."""
        document = self.session.here.document(str(self.output() / "merge_report.json"))
        if document:
            here = words.short_path(self.output(), self.workspace_root)  # the report may come from another machine
            self.show("merged", partial(report.merge_report, {**document, "output": here}))
        return bool(document)

    def output(self) -> Path:
        """Where the merged checkpoint is or will be."""
        return Path(self.workspace_root, self.settings.resolve(None)[0].options.output_path)

    def show(self, title: str, drawing: Drawing) -> None:
        """Fills the lower panel."""
        set_title(self.query_one("#merge-result"), title)
        self.query_one("#merge-text", Pane).show(drawing)

    # --- the job -----------------------------------------------------------------------------------------------------

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        merging = self.follower is not None and self.follower.active
        if action in ("revert", "save_settings"):
            return bool(self.settings.edited) and not merging
        if action in ("merge", "plan", "audit"):
            return not merging
        return merging if action == "stop" else super().check_action(action, parameters)

    @work(group="launch", exit_on_error=False)
    async def action_merge(self) -> None:
        """Starts the merge as a job."""
        run_id = await self.start(lambda: self.session.here.launch(*self.settings.argv()))
        if run_id is None:
            return
        self.follower = Follower(self.session.here, run_id)
        self.keys_changed()
        await self.tick()

    async def tick(self) -> None:
        running = newest_running(self.session.listed_here, "merge")
        if running and self.follower is None and not self.planning:
            self.follower = Follower(self.session.here, running.id)
        follower = self.follower
        if follower is None:
            return
        was_active = follower.active
        changed = await follower.poll()
        if self.follower is not follower or (changed is None and not follower.active):
            return
        if follower.active:
            self.show("merging", partial(report.job_progress, follower))
        elif follower.state == "finished":
            self.session.merged(self.output())
            if not self.show_finished():
                self.show("merged", report.job_end(follower))
        else:
            self.show(follower.state, report.job_end(follower))
        if was_active != follower.active:
            self.keys_changed()

    def action_stop(self) -> None:
        """Asks first."""
        follower = self.follower
        if follower is None:
            return
        detail = "What was written so far stays in the .partial folder; a later merge goes on from there."
        self.app.push_screen(Confirm("Stop this merge?", detail, "stop it"), when_yes(lambda: self._stop(follower)))

    @work(group="stop", exit_on_error=False)
    async def _stop(self, follower: Follower) -> None:
        await self.stop_run(follower.run_id, self.session.here)

    @work(group="plan", exclusive=True, exit_on_error=False)
    async def action_audit(self) -> None:
        """Audits the merged checkpoint from its headers."""
        self.say("")
        self.show("audit", report.waiting("reading the headers …"))
        answer = await self.session.here.command("audit", str(self.output()))
        self.show("audit", report.audit(answer.data) if answer.data else report.problem(answer.error))
