"""Ask: a sample's clip and question, and what the model answers, on the spot."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.widgets import OptionList

from surgvqa.data.lookup import AudioIndex, FrameIndex
from surgvqa.data.samples import Sample, read_samples
from surgvqa.errors import SurgvqaError
from surgvqa.evaluation.interactive import labels_of
from surgvqa.terminal.drawing import bar
from tui import keys
from tui.content import frames
from tui.screens.base import PanelScreen
from tui.session import Session
from tui.targets.asker import Asker
from tui.targets.threads import in_thread
from tui.widgets.filtered import FilteredList
from tui.widgets.pane import Pane
from tui.widgets.titles import set_subtitle, set_title

NO_SAMPLES = 'No samples: put  eval_data_path = "FILE",  frames_dir and audio_dir  into {file}.'
PLAYERS = (("paplay",), ("pw-play",), ("ffplay", "-nodisp", "-autoexit", "-loglevel", "quiet"), ("afplay",), ("aplay",))
"""Programs that play a recording, the first that is there."""


class SampleList(FilteredList[tuple[int, Sample]]):
    """Samples, each with its number in the file."""

    orders: ClassVar[dict[str, Callable[[tuple[int, Sample]], Any]]] = {
        "as in the file": lambda item: 0,
        "type": lambda item: item[1].question_type,
        "label": lambda item: str(item[1].label),
        "video": lambda item: item[1].video_id,
    }

    def key(self, item: tuple[int, Sample]) -> str:
        return str(item[0])

    def row(self, item: tuple[int, Sample]) -> Content:
        return Content(f"{item[1].id}  {item[1].question_type}")

    def text(self, item: tuple[int, Sample]) -> str:
        sample = item[1]
        return f"{sample.id} {sample.question_type} {sample.label} {sample.video_id} {sample.question}"


class AskScreen(PanelScreen):
    """The samples, the clip of the chosen one, and the answer to its question."""

    MODE = "ask"
    ABOUT = (
        "Asks the newest trained adapter, or the checkpoint of surgvqa.toml, the question of the chosen sample. The "
        "model is loaded once, in a process of its own on this machine, and stays loaded until the panel closes or x "
        "ends it."
    )
    BINDINGS: ClassVar[list[BindingType]] = keys.bindings("ask")

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self.samples: list[Sample] = []
        self.asker: Asker | None = None
        self.asking = False
        self._read = False

    def body(self) -> ComposeResult:
        with Horizontal(id="ask"):
            with Vertical(id="ask-list"):
                samples = SampleList(id="samples", classes="panel")
                yield samples
                yield samples.search
            with VerticalScroll(id="ask-side", can_focus=False):
                yield Pane(id="clip", classes="panel")
                yield Pane(id="ask-answer", classes="panel")

    def on_mount(self) -> None:
        for id, title in {"samples": "samples", "clip": "clip", "ask-answer": "answer"}.items():
            set_title(self.query_one(f"#{id}"), title)
        self.query_one(SampleList).focus()

    def on_unmount(self) -> None:
        self.action_unload()

    async def tick(self) -> None:
        if not self._read:
            self._read = True
            self.read()
        self.keys_changed()

    def value(self, name: str) -> str | None:
        """A path of surgvqa.toml, as `evaluate` would read it."""
        found = self.session.here.workspace.value(name, "evaluate")
        return None if found is None else str(found)

    # --- samples -----------------------------------------------------------------------------------------------------

    @work(group="read", exclusive=True, exit_on_error=False)
    async def read(self) -> None:
        """The evaluation's samples, once."""
        file = self.value("eval_data_path")
        if not (file and self.value("frames_dir")):
            workspace_file = self.session.here.workspace.file.name
            self.query_one("#ask-answer", Pane).show(Content(NO_SAMPLES.format(file=workspace_file)))
            return
        try:
            self.samples = await in_thread(read_samples, file)
        except SurgvqaError as error:
            self.say(str(error), "error")
            return
        self.query_one(SampleList).show(enumerate(self.samples))

    @property
    def chosen(self) -> Sample | None:
        """The sample under the highlight."""
        option = self.query_one(SampleList).highlighted_option if self.is_mounted else None
        return self.samples[int(str(option.id))] if option is not None else None

    @on(OptionList.OptionHighlighted)
    def _highlighted(self) -> None:
        self.show_clip()

    @on(OptionList.OptionSelected)
    def _selected(self) -> None:
        self.action_ask()

    @work(group="clip", exclusive=True, exit_on_error=False)
    async def show_clip(self) -> None:
        """Its frames and its question."""
        sample = self.chosen
        if sample is None:
            return
        question = Content.assemble((f"{sample.question}\n", "bold"), (f"label: {sample.label}", "$muted"))
        self.query_one("#ask-answer", Pane).show(question)
        pane = self.query_one("#clip", Pane)
        set_subtitle(pane, f"{len(sample.frames)} frames of {sample.video_id}")
        try:
            images = await in_thread(lambda: frames.thumbnails(self.files(sample)))
        except (SurgvqaError, OSError) as error:
            self.say(str(error), "error")
            return
        pane.show(lambda width: frames.strip(images, width))

    def files(self, sample: Sample) -> list[Path]:
        """The clip's frames. UsageError when one is missing."""
        index = FrameIndex(str(self.value("frames_dir")))
        return [index.find(frame) for frame in sample.frames]

    def recording(self, sample: Sample) -> Path | None:
        """The spoken question; None without a folder of recordings. UsageError when it is missing."""
        folder = self.value("eval_audio_dir") or self.value("audio_dir")
        return AudioIndex(folder, self.samples).find(sample) if folder else None

    # --- what the keys do --------------------------------------------------------------------------------------------

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action == "ask":
            return self.chosen is not None and not self.asking
        if action == "hear":
            return self.chosen is not None
        if action == "unload":
            return self.asker is not None
        return super().check_action(action, parameters)

    def checkpoint(self) -> str | None:
        """The newest training that ended, else the checkpoint of surgvqa.toml."""
        runs = self.session.listed_here
        trained = next((r.id for r in runs if r.command == "train" and r.state in ("finished", "stopped")), None)
        return trained or self.session.here.workspace.value("model_name_or_path", "train")

    @work(group="ask", exit_on_error=False)
    async def action_ask(self) -> None:
        """Loads the model first, where it is not loaded."""
        sample, checkpoint = self.chosen, self.checkpoint()
        if sample is None or self.asking:
            return
        if checkpoint is None:
            self.say("no model to ask: train one (3), or name model_name_or_path in surgvqa.toml", "error")
            return
        self.asking = True
        try:
            recording = await in_thread(self.recording, sample)
            request = {
                "frames": [str(file) for file in await in_thread(self.files, sample)],
                "audio": None if recording is None else str(recording),
                "question": sample.question,
                "labels": labels_of(self.samples, sample.question_type),
            }
            if self.asker is None or not self.asker.alive:
                self.say(f"loading {checkpoint} …")
                self.asker = Asker(["--checkpoint", str(checkpoint)], self.workspace_root)
                ready = await self.asker.start()
                set_subtitle(self.query_one("#ask-answer"), str(ready.get("model", ""))[:60])
            self.say("asking …")
            reply = await self.asker.ask(request)
        except (SurgvqaError, OSError) as error:
            self.say(str(error), "error")
            return
        finally:
            self.asking = False
            self.keys_changed()
        self.say("")
        if sample is self.chosen:
            self.query_one("#ask-answer", Pane).show(answer(sample, reply))

    def action_unload(self) -> None:
        if self.asker is not None:
            self.asker.end()
        self.asker = None

    @work(group="hear", exclusive=True, exit_on_error=False)
    async def action_hear(self) -> None:
        """By the first player of this machine; without one, where the file lies."""
        sample = self.chosen
        try:
            file = await in_thread(self.recording, sample) if sample else None
        except SurgvqaError as error:
            self.say(str(error), "error")
            return
        player = next((program for program in PLAYERS if shutil.which(program[0])), None)
        if file is None or player is None:
            self.say(f"no program here plays {file}" if file else "no audio_dir in surgvqa.toml", "warning")
            return
        null = subprocess.DEVNULL
        await in_thread(lambda: subprocess.run([*player, str(file)], stdin=null, stdout=null, stderr=null, timeout=60))


def answer(sample: Sample, reply: dict[str, Any]) -> Content:
    """The question, what was answered in what time, and how probable each label is."""
    parts: list[Content | str | tuple[str, str]] = [(f"{sample.question}\n", "bold")]
    parts += [f"{reply.get('answer', '')}  ", (f"{float(reply.get('seconds') or 0):.2f} s\n\n", "$muted")]
    weighed = reply.get("probabilities")
    rows = sorted(weighed.items(), key=lambda item: -item[1]) if isinstance(weighed, dict) else []
    widest = max((len(label) for label, _ in rows), default=0)
    for label, probability in rows:
        mark = "label" if label == sample.label else ""
        drawn = str(bar(probability, width=16, alarm=False))
        parts += [f"{label:<{widest}}  {drawn} {100 * probability:5.1f} %  ", (f"{mark}\n", "$success")]
    return Content.assemble(*parts)
