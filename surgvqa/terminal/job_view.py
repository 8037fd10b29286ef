"""Draws a job's events on the terminal, for a job in the foreground and for `surgvqa follow`."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from surgvqa.terminal.drawing import choice_line, console_on
from surgvqa.terminal.figures import amount, human_seconds
from surgvqa.untrusted import cleaned

if TYPE_CHECKING:
    from rich.progress import Progress

NOT_SHOWN = ("v", "t", "kind", "step", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "epoch")
"""Fields of an `eval` event that do not describe the model."""
DRAWN = ("phase", "progress", "output", "metric", "eval", "checkpoint", "preset", "oom", "warning", "error", "finished")


class JobView:
    """Draws events on stderr: a bar for the current phase, and lines that stay. Without a terminal, only lines."""

    def __init__(self, stream: Any = None):
        self.console = console_on(stream or sys.stderr, markup=True)
        self.live = self.console.is_terminal
        self.progress: Progress | None = None
        self.phase = ""
        self.began: tuple[float, float] | None = None
        """Time and amount of the phase's first progress event, since a phase may resume in the middle."""
        self.last_line = 0.0

    def show(self, event: dict[str, Any]) -> None:
        """Draws one event. Unknown kinds are ignored, and so are events that lack the fields of their kind."""
        if event["kind"] in DRAWN:
            with contextlib.suppress(KeyError, TypeError, ValueError):  # a damaged line, or one from another version
                getattr(self, f"_{event['kind']}")(cleaned(event))

    def close(self) -> None:
        """Removes the bar from the screen."""
        if self.progress:
            self.progress.stop()
            self.progress = None

    def _room(self) -> int:
        """Columns left for text beside the spinner and the elapsed time."""
        return max(20, self.console.width - 14)

    def _say(self, text: str) -> None:
        self.console.print(text, soft_wrap=not self.live)  # a file or pipe has no width

    def _phase(self, event: dict[str, Any]) -> None:
        self.close()
        self.phase, self.began = event["name"], None
        self._say(f"[bold]{escape(event['name'])}[/bold] {escape(event.get('text', ''))}".rstrip())
        for choice in event.get("choices", ()):
            self._say(escape(choice_line(**choice)))

    def _progress(self, event: dict[str, Any]) -> None:
        done, total, unit = event["done"], event.get("total"), event.get("unit", "")
        now = event.get("t") or time.time()
        self.began = self.began or (now, done)
        elapsed, since = now - self.began[0], done - self.began[1]
        per_s = since / elapsed if since > 0 and elapsed > 0 else None
        of_total = f" of {amount(total, unit)}" if total else ""
        text = f"{amount(done, unit)}{of_total} {'' if unit == 'bytes' else unit}".strip()
        if per_s:
            text += f", {amount(per_s, unit)}/s" if unit == "bytes" else f", {per_s:.2f}/s"
        if self.live:
            if not self.progress:
                from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn  # not for one line

                self.progress = Progress(
                    TextColumn("  {task.description}"),
                    BarColumn(),
                    TextColumn("{task.fields[text]}"),
                    TimeRemainingColumn(),
                    console=self.console,
                    transient=True,
                )
                self.progress.start()
                self.progress.add_task(event["phase"], total=total, completed=done, text="")
            self.progress.update(self.progress.task_ids[0], completed=done, total=total, text=text)
        elif time.monotonic() - self.last_line > 10 or done == total:
            self.last_line = time.monotonic()
            left = f", {human_seconds((total - done) / per_s)} left" if per_s and total and done < total else ""
            self._say(f"  {escape(event['phase'])}: {text}{left}")

    def _output(self, event: dict[str, Any]) -> None:
        """Shows the latest line of a program such as pip: redrawn in place on a terminal, else a line every 10 s."""
        text = event["text"].strip()
        if self.live:
            if not self.progress:
                from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

                columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
                self.progress = Progress(*columns, console=self.console, transient=True)
                self.progress.start()
                self.progress.add_task("")
            self.progress.update(self.progress.task_ids[0], description=escape(text[: self._room()]))
        elif time.monotonic() - self.last_line > 10:
            self.last_line = time.monotonic()
            self._say(f"  {escape(text)}")

    def _metric(self, event: dict[str, Any]) -> None:
        if event.get("loss") is None or (not self.live and time.monotonic() - self.last_line < 10):
            return
        self.last_line = time.monotonic()
        parts = [
            f"step {event.get('step')}" + (f"/{event['total_steps']}" if event.get("total_steps") else ""),
            f"loss {event['loss']:.4f}",
        ]
        if event.get("learning_rate") is not None:
            parts.append(f"lr {event['learning_rate']:.2e}")
        if event.get("samples_per_s"):
            parts.append(f"{event['samples_per_s']:.2f} samples/s")
        self._say("  " + "  ".join(parts))

    def _eval(self, event: dict[str, Any]) -> None:
        shown = {k: v for k, v in event.items() if k not in NOT_SHOWN and isinstance(v, (int, float))}
        self._say(
            f"  [cyan]evaluation at step {event.get('step')}[/cyan]  "
            + "  ".join(f"{k} {v:.4g}" for k, v in shown.items())
        )

    def _checkpoint(self, event: dict[str, Any]) -> None:
        self._say(f"  [dim]checkpoint {escape(str(event.get('path')))}[/dim]")

    def _preset(self, event: dict[str, Any]) -> None:
        self._say(f"  preset {escape(str(event.get('name')))}")

    def _oom(self, event: dict[str, Any]) -> None:
        step = "" if event.get("step") is None else f" at step {event['step']}"
        self._say(f"[red]out of GPU memory{step}[/red] {escape(str(event.get('text', '')))}")

    def _warning(self, event: dict[str, Any]) -> None:
        self._say(f"[yellow]warning:[/yellow] {escape(event['text'])}")

    def _error(self, event: dict[str, Any]) -> None:
        self.close()

    def _finished(self, event: dict[str, Any]) -> None:
        self.close()


class OutputToLog:
    """Redirects stdout and stderr of a job in the foreground, including those of C libraries, to log.txt.

    `terminal` is the original stderr, for drawing the view. Restores both on exit.
    """

    def __init__(self, log: os.PathLike[str]):
        self.log = log

    def __enter__(self) -> OutputToLog:
        sys.stdout.flush()
        sys.stderr.flush()
        self._saved = os.dup(1), os.dup(2)
        self.terminal = os.fdopen(os.dup(2), "w", buffering=1, errors="replace")
        target = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(target, 1)
        os.dup2(target, 2)
        os.close(target)
        return self

    def __exit__(self, *_: object) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        for saved, number in zip(self._saved, (1, 2)):
            os.dup2(saved, number)
            os.close(saved)
        self.terminal.flush()
