"""What a training run leaves: its output folder, and how to find it again from a run id.

    <output_dir>/adapter_model.safetensors, adapter_config.json    the result, in the checkpoint's old key names
                 surgvqa.json                                      what it was trained with (`Trained`)
                 checkpoint-<step>/                                the same, and what resuming needs

A checkpoint is written under another name and renamed when it is whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import re
import shutil
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgvqa.config.options import DataOptions, Inherited, Path_, TrainOptions, Workspace, settings_of
from surgvqa.errors import UsageError
from surgvqa.runs.commands import runs_dirs
from surgvqa.runs.folder import Run, find_run, read_run_json

RECORD = "surgvqa.json"
ADAPTER = "adapter_model.safetensors"
RETREATED = ("num_frames", "image_size", "gradient_checkpointing", "checkpointed_layers")
"""Options that a run changes when it runs out of memory; surgvqa.json has what they became, run.json what was asked."""
RESUME_FILES = (ADAPTER, "trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth")
"""What a checkpoint must have to be resumed from."""
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
    return Trained(output_dir, values, run.id, preset, getattr(options, "extra", {}), str(Path.cwd()))


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


def find(name: str, workspace: Workspace) -> Trained:
    """The training that `name` means: an output folder, a checkpoint in one, a run folder, run id or run name.

    A folder that no training of ours wrote comes back without options. Raises UsageError when nothing fits.
    """
    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / "run.json").is_file():
        written = read(folder) or Trained(folder, {})
        written.options = _brought_here(written.options, written.cwd, workspace)
        return written
    if not folder.exists() and (folder.is_absolute() or os.sep in name):
        raise UsageError(f"{name}: no such folder; expected an adapter or checkpoint folder, or a run id")
    try:
        run = find_run(name, runs_dirs(workspace), "train")
    except UsageError as error:
        raise UsageError(f"{error}; nor is it a folder") from None
    info = read_run_json(run)
    if info.get("command") != "train":
        raise UsageError(f"{name}: run {run.name} is a {info.get('command')} run, expected a training run")
    record = info.get("options") or {}
    known = settings_of(TrainOptions)
    options = {key: row.get("value") for key, row in record.items() if key in known}
    extra = {key: str(row.get("value")) for key, row in record.items() if key not in known}
    options = _absolute(options, Path(info.get("cwd") or "."))
    options["output_dir"] = options.get("output_dir") or str(run / "checkpoints")
    options = _brought_here(options, info.get("cwd") or "", workspace)
    folder, preset = Path(options["output_dir"]), info.get("preset")
    written = read(folder)
    if written:
        options |= {name: written.options[name] for name in RETREATED if name in written.options}
        preset = written.preset
    return Trained(folder, options, run.name, preset, extra)


def inherit(command: str, given: dict[str, Any], workspace: Workspace) -> Inherited | None:
    """What `train --resume` and `evaluate/ask --checkpoint` take over from the training that they name.

    In `given` the name becomes the folder that it stands for. A resumed run takes all its options over, the others how
    a sample is shown and the base checkpoint.
    """
    option = {"train": "resume", "evaluate": "checkpoint", "ask": "checkpoint"}.get(command)
    name = option and (given.get(option) or workspace.value(option, command))
    if not name:
        return None
    trained = find(str(name), workspace)
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
    known, moved = settings_of(TrainOptions), {}
    for key, value in options.items():
        if cwd and value and key in known and known[key].type is Path_ and not os.path.lexists(value):
            with contextlib.suppress(ValueError):
                here = workspace.root / Path(value).relative_to(cwd)
                moved |= {key: str(here)} if here.exists() else {}
    return options | moved


# --- checkpoints -----------------------------------------------------------------------------------------------------


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint-<step> folders, newest step first."""
    found = [p for p in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]), reverse=True)


def newest_whole_checkpoint(output_dir: Path) -> tuple[Path | None, list[str]]:
    """(the newest checkpoint that can be resumed from, why each newer one cannot)."""
    skipped = []
    for checkpoint in checkpoints(output_dir):
        damage = damage_of(checkpoint)
        if not damage:
            return checkpoint, skipped
        skipped.append(f"{checkpoint.name}: {damage}")
    return None, skipped


def newer_than(checkpoint: Path) -> list[Path]:
    """The checkpoints of later steps beside it, the last one first."""
    return list(itertools.takewhile(lambda other: other != checkpoint, checkpoints(checkpoint.parent)))


def put_aside(checkpoint: Path) -> Path:
    """Renames a damaged checkpoint, so that it counts as none; its new place."""
    aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    return checkpoint.rename(aside)


def damage_of(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed from, told from names, sizes and headers; None when it looks whole."""
    for name in RESUME_FILES:
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.suffix in (".pt", ".pth") and not zipfile.is_zipfile(file):  # its directory stands at the end
            return f"{name} is truncated"
    try:
        step = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
        if checkpoint.name != f"checkpoint-{step}":
            return f"trainer_state.json is of step {step}"
    except (ValueError, KeyError, TypeError):
        return "trainer_state.json is damaged"
    try:
        with open(checkpoint / ADAPTER, "rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_size))
        end = max(row["data_offsets"][1] for key, row in header.items() if key != "__metadata__")
    except (ValueError, KeyError, TypeError, MemoryError, OverflowError):
        return f"{ADAPTER} is damaged"
    if (checkpoint / ADAPTER).stat().st_size != 8 + header_size + end:
        return f"{ADAPTER} is truncated"
    return None


def publish(temporary: Path, final: Path) -> None:
    """Renames a finished folder to its final name, its files on disk first; an older `final` makes room."""
    for file in temporary.iterdir():
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
    with contextlib.suppress(OSError):  # not every file system can fsync a folder
        descriptor = os.open(final.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
