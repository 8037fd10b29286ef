"""Train: the configuration as it will be used, presets by key, the predicted peak, and one key that starts it."""

from __future__ import annotations

from typing import ClassVar

from textual import on, work
from textual.actions import parse
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.content import Content
from textual.widgets import Static

from presets import Preset, PresetError, load_presets
from surgvqa.config.options import TrainOptions
from surgvqa.config.settings import settings_of
from surgvqa.errors import SurgvqaError
from tui import keys, words
from tui.content import report
from tui.content.memory import memory_bar, predicted_bar, predicted_legend
from tui.screens.base import WIDE, RunStarted
from tui.screens.launch_look import LaunchLook
from tui.session import Session
from tui.settings.prediction import PredictedPeak, predict
from tui.settings.settings import Settings, preset_changes
from tui.widgets.form import Field, Form
from tui.widgets.pane import Pane
from tui.widgets.search import Search
from tui.widgets.titles import set_subtitle, set_title

GROUPS: dict[str, tuple[str, ...]] = {
    "data": (
        "run_name",
        "model_name_or_path",
        "train_data_path",
        "eval_data_path",
        "frames_dir",
        "audio_dir",
        "eval_audio_dir",
        "output_dir",
    ),
    "what the model sees": ("num_frames", "image_size", "input_mode", "audio_span", "audio_margin_s"),
    "schedule": (
        "num_train_epochs",
        "max_steps",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "learning_rate",
        "warmup_ratio",
        "eval_strategy",
        "eval_steps",
        "save_strategy",
        "save_steps",
        "early_stopping_patience",
        "seed",
        "report_to",
    ),
    "adapter": ("lora_r", "lora_alpha", "lora_dropout"),
    "memory": (
        "budget_gb",
        "enforce_budget",
        "on_oom",
        "gradient_checkpointing",
        "attn_implementation",
        "optim",
        "device",
    ),
}
LEAST_BAR = 6
"""Columns below which a bar would say nothing."""


class TrainScreen(LaunchLook):
    """Settings on the left; presets, what a switch would change, and the memory on the right."""

    MODE = "train"
    ABOUT = (
        "Every setting with the value that the training will have and where it comes from: the built-in default, the "
        "preset, surgvqa.toml, or what was typed here. F-keys look at another preset; Enter applies it, Esc leaves it. "
        "The job goes on when the panel is closed."
    )
    BINDINGS: ClassVar[list[BindingType]] = keys.bindings("train")

    def __init__(self, session: Session) -> None:
        super().__init__(session, Settings("train", session.here.workspace))
        self.settings.edited.update(self.session.edited.get("train", {}))  # a checkpoint merged before this was opened
        self.session.edited["train"] = self.settings.edited
        self.presets: list[Preset] = []
        self.previewed: str | None = None
        self.folded: set[str] = set()
        """Groups of settings of which only the first is shown."""
        self.shown_for: tuple[object, ...] | None = None
        """Preset, machine and merged checkpoint for which this is drawn."""

    def body(self) -> ComposeResult:
        known = settings_of(TrainOptions)
        with Horizontal(id="train"):
            yield Search("find a setting", done=self._find_setting, left=self._to_form, id="settings-search")
            with Form(id="train-form", classes="panel"):
                for group, names in GROUPS.items():
                    yield Static(group, classes="group", markup=False)
                    for name in names:
                        is_path = known[name].type.__name__ == "Path_"
                        yield Field(name, width=28, is_path=is_path, help=known[name].help, group=group)
            with VerticalScroll(id="train-side"):
                yield Pane(id="presets", classes="panel")
                yield Pane(id="memory", classes="panel")
                yield Pane(id="data", classes="panel")
                yield Pane(id="about", classes="panel", fixed=True)

    def on_mount(self) -> None:
        for id, title in {
            "train-form": "settings",
            "presets": "presets",
            "memory": "memory",
            "data": "data",
            "about": "about",
        }.items():
            set_title(self.query_one(f"#{id}"), title)
        try:
            self.presets = load_presets(self.workspace_root)
        except PresetError as error:
            self.say(str(error), "error")
        self.query_one(Form).field("run_name").focus()
        self.show_all()
        try:
            self.check_data_here()
        except SurgvqaError as error:
            self._say_of_data(report.problem(str(error)))

    def on_resize(self) -> None:
        super().on_resize()
        self.show_about()

    async def tick(self) -> None:
        """Nothing on this screen moves by itself; a preset or a host chosen elsewhere is the exception."""
        if self.shown_for != self._shown():
            self.show_all()

    def _shown(self) -> tuple[object, ...]:
        return (self.session.preset, self.session.target.name, self.session.checkpoint)

    # --- drawing -----------------------------------------------------------------------------------------------------

    def show_all(self) -> None:
        """Fields, presets and memory anew."""
        self.shown_for = self._shown()
        try:
            self.query_one(Form).fill(self.settings, self.session.preset)
        except SurgvqaError as error:
            self.say(str(error), "error")
        self.show_presets()
        self.predict_all()

    @on(Field.Focused)
    def _focused(self) -> None:
        self.show_about()

    def show_presets(self) -> None:
        """The list with a predicted peak each, or what the shown preset would change."""
        self.query_one("#presets", Pane).show(self._presets)

    def _presets(self, width: int) -> Content:
        named = 7 + max((len(preset.name) for preset in self.presets), default=0)
        rows: list[Content] = []
        crowded = self.previewed is not None and self.app.size.width < WIDE  # what would change matters more
        for key, preset in zip(keys.PRESET_KEYS, self.presets):
            chosen, looked_at = preset.name == self.session.preset, preset.name == self.previewed
            if crowded and not (chosen or looked_at):
                continue
            style = "bold $success" if chosen else "bold $accent" if looked_at else ""
            mark = "●" if chosen else "›" if looked_at else " "
            line = Content.assemble((f"{key.upper():>3} ", "$footer-key-foreground"), (f"{mark} {preset.name}", style))
            peak = self.predictions.get(preset.name)
            if peak and peak.peak_bytes:
                fits = "$success" if peak.peak_bytes <= peak.budget_bytes else "$error"
                text = f"{words.gb(peak.peak_bytes):>7}"
                line = Content.assemble(line, " " * (named - line.cell_length), self._peak_bar(peak, width - named - 9))
                line = Content.assemble(line, " " * max(1, width - line.cell_length - len(text)), (text, fits))
            rows.append(line)
        return report.lines(*rows, *(self._changes() if self.previewed else []))

    def _peak_bar(self, found: PredictedPeak, width: int) -> Content:
        """A predicted peak against the budget, on the scale that all presets share; nothing where there is no room."""
        if width < LEAST_BAR:
            return Content("")
        scale = 1.08 * max([found.budget_bytes, *(p.peak_bytes for p in self.predictions.values())])
        style = "$success" if found.peak_bytes <= found.budget_bytes else "$error"
        return memory_bar(width, [(found.peak_bytes, style)], scale, found.budget_bytes)

    def show_about(self) -> None:
        """The preset that is looked at or in use, and the setting under the cursor."""
        preset = next((p for p in self.presets if p.name == (self.previewed or self.session.preset)), None)
        rows: list[Content] = []
        if preset:
            rows = [
                Content.assemble((preset.name, "bold")),
                report.waiting(preset.reason),
                Content.assemble(("gives up ", "$muted"), preset.gives_up, "\n"),
            ]
        field = next((f for f in self.query(Field) if f.has_focus_within), None)
        if field:
            rows += [Content.assemble((f"--{field.key}", "bold")), report.waiting(field.help)]
        self.query_one("#about", Pane).show(report.lines(*rows))
        room = self.app.size.width - 8
        below = (
            words.clip(field.help, room) if field and self.app.size.width < WIDE else ""
        )  # `about` has no room there
        set_subtitle(self.query_one("#train-form"), below)

    def _changes(self) -> list[Content | str]:
        assert self.previewed
        try:
            changes = preset_changes(self.settings, self.session.preset, self.previewed)
        except SurgvqaError as error:
            return ["", report.problem(str(error))]
        rows: list[Content | str] = [
            "",
            Content.assemble(("would change", "bold"), (f"  to {self.previewed}", "$muted")),
        ]
        for change in changes:
            old, new = words.value(change.old), words.value(change.new)
            if change.pinned_by:
                text = Content.assemble(
                    (f"  stays {old}: pinned, {change.pinned_by}", "$warning"), (f" (preset: {new})", "$muted")
                )
            else:
                text = Content.assemble((f"  {old}", "$muted"), " → ", (new, "bold $accent"))
            rows.append(Content.assemble(change.name, text))
        if not changes:
            rows.append(report.waiting("nothing: all is the same"))
        rows.append(
            Content.assemble(
                ("Enter", "bold $footer-key-foreground"),
                " applies   ",
                ("Esc", "bold $footer-key-foreground"),
                " leaves it",
            )
        )
        return rows

    @work(group="predict", exclusive=True, exit_on_error=False)
    async def predict_all(self) -> None:
        """The predicted peak of every preset with the settings as they are."""
        for preset in self.presets:
            self.predictions[preset.name] = await predict(self.settings, preset.name, here=self.session.host is None)
        self.show_presets()
        self.show_memory()

    def show_memory(self) -> None:
        """The configuration's predicted memory against the budget."""
        self.query_one("#memory", Pane).show(self._memory)

    def _memory(self, width: int) -> Content:
        found = self.predictions.get(self.previewed or self.session.preset or "")
        if found is None or not found.peak_bytes:
            return report.waiting(found.problem if found else "predicting …")
        over = found.peak_bytes - found.budget_bytes
        verdict = ("fits", "bold $success") if over <= 0 else (f"over by {words.gb(over)}", "bold $error")
        return report.lines(
            Content.assemble(
                (words.gb(found.peak_bytes), "bold"),
                (f" predicted of {words.gb(found.budget_bytes)}  ", "$muted"),
                verdict,
            ),
            predicted_bar(width, found.parts, found.peak_bytes, found.budget_bytes),
            predicted_legend(found.parts, width),
            *(report.waiting(note) for note in found.notes),
        )

    # --- what the keys do --------------------------------------------------------------------------------------------

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action in ("apply", "leave"):
            return self.previewed is not None
        if action == "launch":
            return self.previewed is None  # with which preset, is to be said first
        if action == "preview":
            return len(self.presets) > int(str(parameters[0]))
        if action == "revert":
            return bool(self.settings.edited)
        if action == "save_settings":
            return bool(self.settings.edited) or self.session.preset != self.settings.workspace.preset
        return super().check_action(action, parameters)

    def about_key(self, binding: Binding) -> str:
        preset = self._preset_of(binding)
        return f"What the preset {preset} would change" if preset else super().about_key(binding)

    def name_key(self, binding: Binding) -> str:
        return self._preset_of(binding) or super().name_key(binding)

    def _preset_of(self, binding: Binding) -> str:
        """The preset that a key looks at."""
        name, arguments = parse(binding.action)[1:]
        index = int(str(arguments[0])) if name == "preview" else -1
        return self.presets[index].name if 0 <= index < len(self.presets) else ""

    def action_preview(self, index: int) -> None:
        """Looks at a preset; the same key again, or the one in use, leaves it."""
        name = self.presets[index].name
        self.previewed = None if name in (self.session.preset, self.previewed) else name
        self._preview_changed()

    def action_apply(self) -> None:
        """The previewed preset becomes the one in use."""
        self.session.preset, self.previewed = self.previewed, None
        self.say(f"preset {self.session.preset} is set for the next launch", "success")
        self.show_where()
        self.show_all()
        self._preview_changed()

    def action_leave(self) -> None:
        self.previewed = None
        self._preview_changed()

    def _preview_changed(self) -> None:
        self.show_presets()
        self.show_about()
        self.show_memory()
        self.keys_changed()

    @on(Field.Edited)
    async def _edited(self, event: Field.Edited) -> None:
        if await self.apply_edit(event, self.settings):
            self.show_all()
            self.keys_changed()

    def action_revert(self) -> None:
        field = next((f for f in self.query(Field) if f.has_focus), None)
        if field and self.settings.revert(field.key):
            self.say("")
            self.show_all()
            self.keys_changed()

    def action_save_settings(self) -> None:
        if self.save_settings(self.settings, self.session.preset):
            self.show_all()
            self.keys_changed()

    def action_search(self) -> None:
        """Finds a setting by a part of its name."""
        self.query_one("#settings-search", Search).ask()

    def _find_setting(self, text: str) -> None:
        """The first setting whose name holds the words, else whose help does; its group is unfolded."""
        wanted = text.strip().lower().replace(" ", "_")
        fields = list(self.query(Field))
        found = [field for field in fields if wanted in field.key] or [
            field for field in fields if text.strip().lower() in field.help.lower()
        ]
        if not wanted or not found:
            self.say(f"no setting holds {text!r}" if wanted else "", "warning")
            self._to_form()
            return
        self._unfold(found[0].group)
        self.screen.set_focus(found[0])
        names = ", ".join(field.key for field in found[1:5])
        self.say(f"also: {names}" if names else "")

    def _to_form(self) -> None:
        form = self.query_one(Form)
        self.screen.set_focus(next((f for f in form.query(Field) if f.has_focus), None) or form.field("run_name"))

    def action_fold(self) -> None:
        """Folds the group of the setting that has the keys; with its heading alone it can be unfolded again."""
        field = next((f for f in self.query(Field) if f.has_focus_within), None)
        if self.folded and field is None:
            self._unfold(*self.folded)
        elif field is not None:
            if field.group in self.folded:
                self._unfold(field.group)
            else:
                self.folded.add(field.group)
                self.show_groups()

    def _unfold(self, *groups: str) -> None:
        self.folded -= set(groups)
        self.show_groups()

    def show_groups(self) -> None:
        """Of a folded group its heading and its first setting are left."""
        seen: set[str] = set()
        for field in self.query(Field):
            field.display = field.group not in self.folded or field.group not in seen
            seen.add(field.group)
        for heading, group in zip(self.query(".group"), GROUPS):
            count = len(GROUPS[group]) - 1
            more = Content.assemble(group, (f"  and {count} more · z unfolds", "$muted"))
            heading.update(more if group in self.folded else Content(group))  # type: ignore[attr-defined]  # a Static

    def action_launch(self) -> None:
        """Starts training; asks first while another job has the GPU there."""
        self.ask_beside("Start training", self._launch)

    @work(group="launch", exit_on_error=False)
    async def _launch(self, share: bool) -> None:
        target = self.session.target

        async def launch() -> str:
            argv = self.settings.argv(self.session.preset, everything=self.session.host is not None)
            return await target.launch(*argv, share=share)

        run_id = await self.start(launch)
        if run_id:
            self.post_message(RunStarted(run_id))
