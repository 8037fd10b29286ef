"""What a training run leaves: its output folder, and how to find it again from a run id.

    <output_dir>/adapter_model.safetensors, adapter_config.json    the result, in the checkpoint's old key names
                 surgvqa.json                                      what it was trained with (`Trained`)
                 checkpoint-<step>/                                the same, and what resuming needs

A checkpoint is written under another name and renamed when it is whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from surgvqa.config.options import DataOptions, TrainOptions
from surgvqa.config.resolve import Inherited
from surgvqa.config.settings import Path_, settings_of
from surgvqa.config.workspace import Workspace
from surgvqa.errors import UsageError
from surgvqa.runs.folder import Run
from surgvqa.runs.history import find_run
from surgvqa.runs.state import read_run_json
from surgvqa.training import checkpoints

RECORD = "surgvqa.json"
RETREATED = ("num_frames", "image_size", "gradient_checkpointing", "checkpointed_layers")
"""Options that a run changes when it runs out of memory; surgvqa.json has what they became, run.json what was asked."""
BUSY_S = 12.0
"""So long a training that was killed may still hold its output folder: its worker processes look every 5 s whether it
lives."""


@dataclass
class Trained:
    """The output folder of a training run and the options it ran with (paths absolute)."""

    folder: Path
    options: dict[str, Any]
    run: str | None = None
    preset: str | None = None
    extra: dict[str, str] = field(default_factory=dict)
    cwd: str = ""
    """Where it ran: on a GPU host, the workspace there."""
    step: int | None = None
    """Of the adapter beside it. None: a training has begun and not ended; an adapter there is an earlier one's."""

    def document(self) -> dict[str, Any]:
        """What surgvqa.json holds."""
        return {
            "v": 1,
            "run": self.run,
            "base_model": self.options.get("model_name_or_path"),
            "output_dir": str(self.folder),
            "cwd": self.cwd,
            "options": self.options,
            "extra": self.extra,
            "preset": self.preset,
        }


def record_of(options: TrainOptions, output_dir: Path, run: Run) -> Trained:
    """The training that `options` describe, for the surgvqa.json of its results."""
    values = {name: getattr(options, name) for name in settings_of(TrainOptions) if name != "resume"}
    values = _absolute(values | {"output_dir": str(output_dir)}, Path.cwd())
    preset = read_run_json(run.folder).get("preset")
    return Trained(output_dir, values, run.id, preset, options.extra, str(Path.cwd()))


def read(folder: Path) -> Trained | None:
    """surgvqa.json of an output folder or of a checkpoint in it; None when there is none."""
    try:
        document = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        options = dict(document["options"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder / RECORD}: not a record of training ({error}); delete it to go on without") from None
    extra, cwd, step = document.get("extra") or {}, document.get("cwd") or "", document.get("step")
    return Trained(folder, options, document.get("run"), document.get("preset"), extra, cwd, step)


def find(name: str, workspace: Workspace, given: Collection[str] = ()) -> Trained:
    """The training that `name` means: an output folder, a checkpoint in one, a run folder, run id or run name.

    A run that was to go on from another and has saved nothing yet stands for that one's saved state; `given` are the
    options that are named anew. A folder that no training of ours wrote comes back without options. Raises UsageError
    when nothing fits.
    """
    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / "run.json").is_file():
        written = read(folder) or Trained(folder, {})
        written.options = _brought_here(written.options, written.cwd, workspace)
        return written
    if not folder.exists() and (folder.is_absolute() or os.sep in name):
        raise UsageError(f"{name}: no such folder; expected an adapter or checkpoint folder, or a run id")
    try:
        run = find_run(name, workspace.runs_dirs, "train")
    except UsageError as error:
        raise UsageError(f"{error}; nor is it a folder") from None
    info = read_run_json(run)
    if info.get("command") != "train":
        raise UsageError(f"{name}: run {run.name} is a {info.get('command')} run, expected a training run")
    if "options" not in info:
        return _before_it_began(run.name, [str(word) for word in info.get("argv", [])], workspace, given)
    record = info["options"]
    known = settings_of(TrainOptions)
    options = {key: row.get("value") for key, row in record.items() if key in known}
    extra = {key: str(row.get("value")) for key, row in record.items() if key not in known}
    options = _absolute(options, Path(info.get("cwd") or "."))
    options["output_dir"] = options.get("output_dir") or str(run / "checkpoints")
    options = _brought_here(options, info.get("cwd") or "", workspace)
    folder, preset = Path(options["output_dir"]), info.get("preset")
    last = read(folder)
    if last:
        options |= {name: last.options[name] for name in RETREATED if name in last.options}
        preset = last.preset
    return Trained(_newest_state(folder, options.get("resume")), options, run.name, preset, extra)


def _newest_state(folder: Path, resumed: str | None) -> Path:
    """`folder`, or what its training was to go on from when it ended before it had saved a state of its own."""
    seen = {folder}
    while resumed and checkpoints.newest_whole_checkpoint(folder)[0] is None:
        earlier = Path(resumed)
        if earlier in seen or not earlier.is_dir():
            break
        seen.add(earlier)
        written = read(earlier)
        folder, resumed = earlier, written.options.get("resume") if written else None
        if folder.name.startswith("checkpoint-"):
            break
    return folder


def _before_it_began(run: str, argv: list[str], workspace: Workspace, given: Collection[str]) -> Trained:
    """What a run was to go on from that ended before it had written its options: its input was refused, or a signal
    came. Raises UsageError when it was no resumed one, or had asked for changes that would be lost."""
    words = [part for word in argv[1:] for part in (word.split("=", 1) if word.startswith("--") else [word])]
    asked = {name.removeprefix("--"): value for name, value in pairwise(words) if name.startswith("--")}
    earlier = asked.pop("resume", None)
    if not earlier or earlier == run:
        raise UsageError(f"{run}: it ended before it began, so there is nothing to resume; start it anew")
    lost = [f"--{name} {value}" for name, value in asked.items() if name != "workspace" and name not in given]
    if lost:
        raise UsageError(
            f"{run}: it ended before it began, and had asked for {' '.join(lost)}; name them again: "
            f"surgvqa train --resume {earlier} {' '.join(lost)}"
        )
    return find(earlier, workspace, given)


def inherit(command: str, given: dict[str, Any], workspace: Workspace) -> Inherited | None:
    """What `train --resume` and `evaluate/ask --checkpoint` take over from the training that they name.

    In `given` the name becomes the folder that it stands for. A resumed run takes all its options over, the others how
    a sample is shown and the base checkpoint.
    """
    option = {"train": "resume", "evaluate": "checkpoint", "ask": "checkpoint"}.get(command)
    name = option and (given.get(option) or workspace.value(option, command))
    if not option or not name:
        return None
    trained = find(str(name), workspace, given)
    given[option] = Path_(trained.folder)
    kept = set(settings_of(DataOptions)) | {"model_name_or_path"} if command != "train" else set(trained.options)
    values = {key: value for key, value in trained.options.items() if key in kept and key != option}
    if command == "train":
        if not values:
            raise UsageError(f"{name}: no {RECORD} there, so nothing says how it was trained; expected a training run")
        return Inherited(values, f"run {trained.run}", trained.preset, trained.extra)
    return Inherited(values, f"trained with ({trained.run or trained.folder.name})")


@contextlib.contextmanager
def only_one(output_dir: Path) -> Iterator[None]:
    """While entered, no other training has this output folder. UsageError when one has it already.

    The folder itself is locked, so nothing is left behind; where a file system knows no such locks, nobody is kept out.
    """
    descriptor, deadline = os.open(output_dir, os.O_RDONLY), time.monotonic() + BUSY_S
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    other = read(output_dir)
                    run = other.run if other and other.run else "another training"
                    raise UsageError(
                        f"{output_dir}: {run} is at work there; wait for it, stop it, or choose another output_dir"
                    ) from None
                time.sleep(0.2)
            except OSError:
                break
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # also for worker processes, which have inherited it
        os.close(descriptor)


def _absolute(options: dict[str, Any], base: Path) -> dict[str, Any]:
    """Path options relative to `base` made absolute."""
    known = settings_of(TrainOptions)
    return {
        key: os.path.abspath(base / value) if value and key in known and known[key].type is Path_ else value
        for key, value in options.items()
    }


def _brought_here(options: dict[str, Any], cwd: str, workspace: Workspace) -> dict[str, Any]:
    """Options of a run that was fetched from a GPU host: what it had in its workspace and this one has too, is here."""
    known = settings_of(TrainOptions)
    moved: dict[str, Any] = {}
    for key, value in options.items():
        if cwd and value and key in known and known[key].type is Path_ and not os.path.lexists(value):
            with contextlib.suppress(ValueError):
                here = workspace.root / Path(value).relative_to(cwd)
                moved |= {key: str(here)} if here.exists() else {}
    return options | moved
