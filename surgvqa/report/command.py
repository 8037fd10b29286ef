"""`surgvqa report`: one HTML page with scores, samples, their frames and recordings, and answers side by side."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from surgvqa.config.options import ReportOptions
from surgvqa.config.workspace import Workspace
from surgvqa.data.samples import read_samples
from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.outcome import Outcome
from surgvqa.report.collect import Inputs, compare_all, find_clusters, join, read_inputs
from surgvqa.report.media import Clip, Store, embed, find_media, link
from surgvqa.report.page import GENERATOR, Page, render

MEDIA = {"frames_dir": "frames", "audio_dir": "recordings"}
NAMES_BYTES = 120
"""Bytes that a clip's names and notes add to the page."""


def check(options: ReportOptions) -> None:
    """Raises UsageError when the page would replace a file that is not a report, or when its folder is missing."""
    page = Path(options.output)
    if page.is_dir() or not page.resolve().parent.is_dir():
        what = "a folder" if page.is_dir() else "in a folder that does not exist"
        raise UsageError(f"output: {page} is {what}, expected a file name such as report.html")
    if page.exists():
        with open(page, "rb") as file:
            if GENERATOR.encode() not in file.read(4096):
                raise UsageError(f"output: {page} exists and is not a report of this program; name another file")


def run(options: ReportOptions, workspace: Workspace) -> Outcome:
    """Writes the page atomically."""
    began = time.monotonic()
    inputs = read_inputs(options.files or (), workspace)
    chosen = _folders(options, inputs, workspace)
    samples = inputs.samples or (read_samples(chosen["eval_data_path"]) if chosen["eval_data_path"] else [])
    if not samples and not inputs.models:
        raise UsageError("nothing to show: name a run, a file of predictions or a file of samples")
    entries, notes = join(samples, inputs.models)
    notes += find_clusters(inputs.models, samples) if samples else []
    comparisons, uncompared = compare_all(inputs.models)
    notes += uncompared
    shown = entries[: options.limit] if options.limit else entries
    if len(shown) < len(entries):
        notes.append(f"only the first {len(shown)} of {len(entries)} samples are shown (--limit)")
    page = Page(
        title=options.title or " and ".join(model.name for model in inputs.models) or Path(samples[0].file).name,
        made=time.strftime("%Y-%m-%d %H:%M"),
        models=inputs.models,
        entries=shown,
        clips=find_media([entry.sample for entry in shown], chosen["frames_dir"], chosen["audio_dir"]),
        notes=notes,
        comparisons=comparisons,
        linked=options.link,
    )
    if samples:
        notes += [f"no {what}: {name} is not set" for name, what in MEDIA.items() if not chosen[name]]
    width = _fill(page, options)
    size = _write(Path(options.output), page)
    data = {
        "output": str(options.output),
        "bytes": size,
        "samples": len(shown),
        "models": [model.name for model in inputs.models],
        "frame_width": width,
        "notes": page.notes,
        "seconds": time.monotonic() - began,
    }
    return Outcome(data, show=lambda console: _show(console, data))


def _folders(options: ReportOptions, inputs: Inputs, workspace: Workspace) -> dict[str, str | None]:
    """The paths of samples, frames and recordings: from the command line, else from the run, else from surgvqa.toml."""
    chosen: dict[str, str | None] = {}
    for name in ("eval_data_path", "frames_dir", "audio_dir", "eval_audio_dir"):
        asked, of_run = getattr(options, name), inputs.defaults.get(name)
        if of_run and asked in (None, workspace.value(name, "report")):
            here = workspace.root / of_run
            asked = str(here) if not os.path.exists(of_run) and here.exists() else of_run
        chosen[name] = asked
    chosen["audio_dir"] = chosen["eval_audio_dir"] or chosen["audio_dir"]
    return chosen


def _fill(page: Page, options: ReportOptions) -> int | None:
    """Embeds or links frames and recordings and notes what is missing. Returns the thumbnails' width in pixels."""
    store = None
    if options.link:
        link(page.clips, Path(options.output))
    else:
        text_bytes = sum(len(piece.encode(errors="replace")) for piece in render(page))
        store = _embed(page.clips, options.max_mb * 1e6 - text_bytes - NAMES_BYTES * (len(page.clips) + 10))
        page.parts = store.parts
        for kind, count in store.left_out.items():
            room = f"{options.max_mb:g} MB"
            page.notes.append(f"{count} {kind} did not fit into {room}; --max_mb N allows more, --link embeds none")
    lacking = sum(bool(clip.notes) for clip in page.clips)
    if lacking:
        page.notes.append(f"{lacking} samples have a missing or unreadable frame or recording: Show, with notes")
    return store.width if store else None


def _embed(clips: Sequence[Clip], limit_bytes: float) -> Store:
    """Embeds the clips, with a progress bar on the terminal."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("thumbnails")
        return embed(clips, max(0.0, limit_bytes), lambda done, total: bar.update(task, completed=done, total=total))


def _write(file: Path, page: Page) -> int:
    """Writes the page atomically and returns its size in bytes. Raises SurgvqaError when it cannot be written."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", errors="replace", newline="\n") as out:
            out.writelines(render(page))
        os.replace(temporary, file)
    except OSError as error:
        raise SurgvqaError(f"{file}: cannot be written: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return file.stat().st_size


def _show(console: Any, data: dict[str, Any]) -> None:
    from rich.markup import escape

    console.print(f"{escape(data['output'])}: {data['samples']} samples, {data['bytes'] / 1e6:.1f} MB")
    for note in data["notes"]:
        console.print(f"  {escape(note)}", style="yellow")
