"""Upload: what would go to the GPU host, and how large it is."""

from __future__ import annotations

import asyncio
from typing import ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.widgets import Static

from surgvqa.errors import SurgvqaError
from tui import words
from tui.base import PanelScreen
from tui.plan import Item, file_plan

WHAT, FILES, SIZE = 20, 8, 11  # widths of the plan's columns; the path takes the rest

NO_HOST = (
    "No host is set. Everything runs on this machine.\n"
    'To use a GPU host, put  host = "NAME"  into {file} (a name of ~/.ssh/config or hosts.toml),\n'
    "or start the panel with  surgvqa-tui --host NAME ."
)
SET_HOST = "Host {host} is set. The plan below is what it needs; surgvqa-remote upload {host} sends it."


class UploadScreen(PanelScreen):
    """The file plan."""

    MODE = "upload"
    ABOUT = (
        "Lists what a GPU host needs: the merged checkpoint or the adapter to merge there, the JSONL files, and only "
        "the frames and spoken questions that they name."
    )
    BINDINGS: ClassVar[list[BindingType]] = [Binding("p", "plan", "plan again", tooltip="Read the files again")]

    def body(self) -> ComposeResult:
        with VerticalScroll(id="upload", can_focus=True):
            yield Static("", id="host-text", classes="panel", markup=False)
            yield Static("", id="plan-text", classes="panel", markup=False)

    def on_mount(self) -> None:
        host = self.app.host
        text = SET_HOST.format(host=host) if host else NO_HOST.format(file=self.app.target.workspace.file.name)
        panel = self.query_one("#host-text", Static)
        panel.border_title = "host"
        panel.update(Content(text))
        self.query_one("#plan-text").border_title = "what it needs"
        self.action_plan()

    @work(group="plan", exclusive=True, exit_on_error=False)
    async def action_plan(self) -> None:
        """Reads the files in a thread."""
        panel = self.query_one("#plan-text", Static)
        panel.update(Content.assemble(("reading the files …", "$muted")))
        try:
            items = await asyncio.to_thread(file_plan, self.app.target.workspace)
        except (OSError, SurgvqaError) as error:
            panel.update(Content(""))
            self.say(str(error), "error")
            return
        self.say("")
        panel.update(
            self.table(items) if items else Content("Nothing to send: surgvqa.toml names no checkpoint and no data.")
        )

    def table(self, items: list[Item]) -> Content:
        """The plan, a row an item, as wide as the screen."""
        width = max(40, self.query_one("#plan-text").size.width)
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
