"""The results of a training run: its output folder, and how to find it from a run id.

    <output_dir>/adapter_model.safetensors, adapter_config.json    the result, in the checkpoint's old key names
                 surgvqa.json                                      the options of its training (`Trained`)
                 checkpoint-<step>/                                the same, and what a resume needs

A checkpoint is written under a temporary name and renamed when it is complete.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
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
from surgvqa.files import read_json
from surgvqa.memory.reductions import SHOWN
from surgvqa.merge.plan import REPORT_FILE
from surgvqa.runs.folder import Run
from surgvqa.runs.history import find_run, start_of
from surgvqa.runs.state import read_run_json
from surgvqa.training import checkpoints

RECORD = "surgvqa.json"
CHANGED = (*SHOWN, "gradient_checkpointing", "checkpointed_layers", "gradient_accumulation_steps")
"""Options that a run may change when it runs out of memory or resumes on another number of GPUs. surgvqa.json has their
new values, run.json the requested ones."""
HEARD = ("audio_span", "audio_margin_s")
"""Options for how questions reach the model. A training from a merged checkpoint inherits them."""
BUSY_S = 12.0
"""Seconds a killed training may keep its output folder locked, because its worker processes check only every 5 s
whether it is alive."""


@dataclass
class Trained:
    """The output folder of a training run and its options (with absolute paths)."""

    folder: Path
    options: dict[str, Any]
    run: str | None = None
    preset: str | None = None
    extra: dict[str, str] = field(default_factory=dict)
    cwd: str = ""
    """Its working directory; on a GPU host, the workspace there."""
    step: int | None = None
    """The step of the adapter in the folder. None: the training has not ended, and an adapter there is from an earlier
    one."""

    def document(self) -> dict[str, Any]:
        """The content of surgvqa.json."""
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
    """The record of this training, for surgvqa.json."""
    values = {name: getattr(options, name) for name in settings_of(TrainOptions) if name != "resume"}
    values = _absolute(values | {"output_dir": str(output_dir)}, Path.cwd())
    preset = read_run_json(run.folder).get("preset")
    return Trained(output_dir, values, run.id, preset, options.extra, str(Path.cwd()))


def read(folder: Path) -> Trained | None:
    """Reads surgvqa.json of an output folder or of a checkpoint in it; None if there is none."""
    try:
        document = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        options = dict(document["options"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder / RECORD}: not a record of training ({error}); delete it to continue") from None
    extra, cwd, step = document.get("extra") or {}, document.get("cwd") or "", document.get("step")
    return Trained(folder, options, document.get("run"), document.get("preset"), extra, cwd, step)


def merged(folder: Path) -> Trained | None:
    """The record in the merge report of a merged checkpoint: how samples were shown in the adapter's training."""
    try:
        shown = read_json(folder / REPORT_FILE)["stage2"]["shown"]
        known = settings_of(DataOptions)
        return Trained(folder, {name: value for name, value in shown.items() if name in known})
    except (UsageError, KeyError, TypeError, AttributeError):
        return None


def find(
    name: str, workspace: Workspace, given: Collection[str] = (), behind: tuple[tuple[str, float], ...] = ()
) -> Trained:
    """The training called `name`: an output folder, a checkpoint in one, a run folder, run id or run name.

    `behind`: the runs (name, start time) that were to resume from it, the newest first. "last" means one before them.

    If a resumed run has not saved anything yet, returns the saved state that it resumed from; `given` are the options
    that the user names again. A folder that was not written by a training of ours has no options. Raises UsageError
    when nothing matches.
    """
    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / "run.json").is_file():
        written = read(folder) or merged(folder) or Trained(folder, {})
        written.options = _paths_here(written.options, written.cwd, workspace)
        return written
    if not folder.exists() and (folder.is_absolute() or os.sep in name):
        raise UsageError(f"{name}: no such folder; expected an adapter or checkpoint folder, or a run id")
    try:
        run = find_run(name, workspace.runs_dirs, "train", behind[-1][1] if behind else math.inf)
    except UsageError as error:
        raise UsageError(f"{error}; nor is it a folder") from None
    info = read_run_json(run)
    if info.get("command") != "train":
        raise UsageError(f"{name}: run {run.name} is a {info.get('command')} run, expected a training run")
    if run.name in [one for one, _ in behind]:
        raise UsageError(f"{run.name}: was to resume from itself, so there is nothing to resume; start it again")
    if "options" not in info:
        argv = [str(word) for word in info.get("argv", [])]
        return _resumed_by(argv, workspace, given, (*behind, (run.name, info.get("started", math.inf))))
    record = info["options"]
    known = settings_of(TrainOptions)
    options = {key: row.get("value") for key, row in record.items() if key in known}
    extra = {key: str(row.get("value")) for key, row in record.items() if key not in known}
    options = _absolute(options, Path(info.get("cwd") or "."))
    options["output_dir"] = options.get("output_dir") or str(run / "checkpoints")
    options = _paths_here(options, info.get("cwd") or "", workspace)
    folder, preset = Path(options["output_dir"]), info.get("preset")
    last = read(folder)
    if last:
        options |= {name: last.options[name] for name in CHANGED if name in last.options}
        preset = last.preset
    return Trained(_newest_state(folder, options.get("resume")), options, run.name, preset, extra)


def _newest_state(folder: Path, resumed: str | None) -> Path:
    """`folder`, or the state that its training resumed from if it ended before it saved its own."""
    seen = {folder}
    while resumed and checkpoints.newest_complete_checkpoint(folder)[0] is None:
        earlier = Path(resumed)
        if earlier in seen or not earlier.is_dir():
            break
        seen.add(earlier)
        written = read(earlier)
        folder, resumed = earlier, written.options.get("resume") if written else None
        if folder.name.startswith("checkpoint-"):
            break
    return folder


def _resumed_by(
    argv: list[str], workspace: Workspace, given: Collection[str], behind: tuple[tuple[str, float], ...]
) -> Trained:
    """The training that a run resumed from, if the run ended before it wrote its options (bad input, or a signal).

    Raises UsageError when it was not a resumed run, or when it had options that would be lost.
    """
    run = behind[-1][0]
    words = [part for word in argv[1:] for part in (word.split("=", 1) if word.startswith("--") else [word])]
    asked = {name.removeprefix("--"): value for name, value in pairwise(words) if name.startswith("--")}
    earlier = asked.pop("resume", None)
    if not earlier or earlier == run:
        raise UsageError(f"{run}: it ended before it began, so there is nothing to resume; start it again")
    lost = [f"--{name} {value}" for name, value in asked.items() if name != "workspace" and name not in given]
    if lost:
        raise UsageError(
            f"{run}: it ended before it began, and had the options {' '.join(lost)}; give them again: "
            f"surgvqa train --resume {earlier} {' '.join(lost)}"
        )
    return find(earlier, workspace, given, behind)


def inherit(command: str, given: dict[str, Any], workspace: Workspace, own: str | None = None) -> Inherited | None:
    """The options that `train --resume` and `evaluate/probe/ask --checkpoint` inherit from the training that they name.

    `own` is the id of the run that is starting. Replaces the name in `given` by its folder. A resumed run inherits all
    options, the others those for showing samples and the base checkpoint.
    """
    option = {"train": "resume", "evaluate": "checkpoint", "probe": "checkpoint", "ask": "checkpoint"}.get(command)
    name = option and (given.get(option) or workspace.value(option, command))
    if command == "train" and not name:
        base = given.get("model_name_or_path") or workspace.value("model_name_or_path", command)
        heard = merged(Path(base)) if base else None
        values = {key: value for key, value in heard.options.items() if key in HEARD} if heard else {}
        return Inherited(values, f"trained with ({base})") if values else None
    if not option or not name:
        return None
    behind = ((own, start_of(own, workspace.runs_dirs)),) if own else ()
    trained = find(str(name), workspace, given, behind)
    given[option] = Path_(trained.folder)
    kept = set(settings_of(DataOptions)) | {"model_name_or_path"} if command != "train" else set(trained.options)
    values = {key: value for key, value in trained.options.items() if key in kept and key != option}
    if command == "train":
        if not values:
            raise UsageError(f"{name}: has no {RECORD}, so its options are unknown; expected a training run")
        return Inherited(values, f"run {trained.run}", trained.preset, trained.extra)
    return Inherited(values, f"trained with ({trained.run or trained.folder.name})")


@contextlib.contextmanager
def output_lock(output_dir: Path) -> Iterator[None]:
    """Locks an output folder against other trainings. Raises UsageError when one has locked it already.

    Locks the folder itself, so no file is left behind. Has no effect on file systems without such locks.
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
                        f"{output_dir}: {run} is working there; wait for it, stop it, or choose another output_dir"
                    ) from None
                time.sleep(0.2)
            except OSError:
                break
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # also releases the lock for worker processes, which inherited it
        os.close(descriptor)


def _absolute(options: dict[str, Any], base: Path) -> dict[str, Any]:
    """The options with paths made absolute, relative to `base`."""
    known = settings_of(TrainOptions)
    return {
        key: os.path.abspath(base / value) if value and key in known and known[key].type is Path_ else value
        for key, value in options.items()
    }


def _paths_here(options: dict[str, Any], cwd: str, workspace: Workspace) -> dict[str, Any]:
    """The options of a run fetched from a GPU host, with paths in its workspace replaced by those that exist in this
    one."""
    known = settings_of(TrainOptions)
    moved: dict[str, Any] = {}
    for key, value in options.items():
        if cwd and value and key in known and known[key].type is Path_ and not os.path.lexists(value):
            with contextlib.suppress(ValueError):
                here = workspace.root / Path(value).relative_to(cwd)
                moved |= {key: str(here)} if here.exists() else {}
    return options | moved
