"""What a launch would do, before it does: the exact command, the data it would read, a dry run."""

from __future__ import annotations

import shlex
from pathlib import Path

from textual import work
from textual.content import Content

from surgvqa.errors import SurgvqaError
from tui import words
from tui.content import report, scores
from tui.dialogs.entry import EntryDialog
from tui.screens.base import PanelScreen
from tui.session import Session
from tui.settings.prediction import PredictedPeak
from tui.settings.settings import Settings
from tui.widgets.pane import Pane


class LaunchLook(PanelScreen):
    """The keys that look and start nothing."""

    def __init__(self, session: Session, settings: Settings) -> None:
        super().__init__(session)
        self.settings = settings
        self.predictions: dict[str, PredictedPeak] = {}
        """By preset."""
        self.data_said = Content("")

    def command(self) -> str:
        """The exact command that launch would start, for a shell."""
        host = self.session.host
        argv = self.settings.argv(self.session.preset, everything=host is not None)
        return shlex.join(["surgvqa", *argv] if host is None else ["surgvqa-remote", "launch", host.name, *argv])

    def action_copy(self) -> None:
        """Through the terminal (OSC 52)."""
        try:
            command = self.command()
        except SurgvqaError as error:
            self.say(str(error), "error")
            return
        self.app.copy_to_clipboard(command)
        self.say(f"copied: {command}")

    def action_dry_run(self) -> None:
        """What launch would start, and what is known of it; nothing is started."""
        try:
            missing = self.settings.resolve(self.session.preset)[1]
            command = self.command()
        except SurgvqaError as error:
            self.say(str(error), "error")
            return
        found = self.predictions.get(self.session.preset or "")
        memory = "not predicted yet"
        if found and found.peak_bytes:
            fits = "fits" if found.peak_bytes <= found.budget_bytes else "does not fit"
            memory = f"{words.gb(found.peak_bytes)} predicted of {words.gb(found.budget_bytes)}: {fits}"
        parts = [("memory", memory), ("data", self.data_said.plain or "not checked yet: d checks it")]
        parts += [("missing", ", ".join(missing))] if missing else []
        self.app.push_screen(EntryDialog("dry run: l would start this; nothing was started", command, parts))

    @work(group="check", exclusive=True, exit_on_error=False)
    async def action_check_data(self) -> None:
        """Reads every sample, in a process of its own."""
        options = self.settings.resolve(self.session.preset)[0].options
        files = [str(path) for path in (options.train_data_path, options.eval_data_path) if path]
        folders = [
            f"--{name}={value}"
            for name in ("frames_dir", "audio_dir", "eval_audio_dir")
            if (value := getattr(options, name))
        ]
        if not files:
            self._say_of_data(report.waiting("train_data_path is not set"))
            return
        self._say_of_data(report.waiting("reading every sample …"))
        answer = await self.session.here.command("check-data", *files, *folders)
        self._say_of_data(scores.data_check(answer.data) if answer.data else report.problem(answer.error))

    def _say_of_data(self, content: Content) -> None:
        self.data_said = content
        self.query_one("#data", Pane).show(content)

    def check_data_here(self) -> None:
        """Once the screen is there, when the samples lie where the settings say."""
        data = self.settings.resolve(self.session.preset)[0].options.train_data_path
        if data and Path(self.workspace_root, data).is_file():
            self.action_check_data()
        else:
            self._say_of_data(report.waiting("no such file" if data else "train_data_path is not set"))
