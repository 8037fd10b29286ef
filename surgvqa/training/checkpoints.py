"""The checkpoint-<step> folders of a training: lists, checks, renames and publishes them."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import zipfile
from pathlib import Path

from surgvqa.checkpoint.headers import read_header

ADAPTER = "adapter_model.safetensors"
RESUME_FILES = (ADAPTER, "trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth")
"""Files that a checkpoint needs for a resume."""


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint-<step> folders, newest step first."""
    found = [p for p in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]), reverse=True)


def newest_complete_checkpoint(output_dir: Path) -> tuple[Path | None, list[str]]:
    """(the newest checkpoint that can be resumed, messages on why newer ones cannot)."""
    skipped: list[str] = []
    for checkpoint in checkpoints(output_dir):
        damage = damage_of(checkpoint)
        if not damage:
            return checkpoint, skipped
        skipped.append(f"{checkpoint.name}: {damage}")
    return None, skipped


def newer_than(checkpoint: Path) -> list[Path]:
    """The checkpoints of later steps in the same folder, the last one first."""
    return list(itertools.takewhile(lambda other: other != checkpoint, checkpoints(checkpoint.parent)))


def rename_damaged(checkpoint: Path) -> Path:
    """Renames a damaged checkpoint so that it no longer counts as one. Returns its new path."""
    aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
    shutil.rmtree(aside, ignore_errors=True)
    return checkpoint.rename(aside)


def damage_of(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed, from names, sizes and headers; None if it looks complete."""
    for name in RESUME_FILES:
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.suffix in (".pt", ".pth") and not zipfile.is_zipfile(file):  # a zip file's directory is at its end
            return f"{name} is truncated"
    try:
        step = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
        if checkpoint.name != f"checkpoint-{step}":
            return f"trainer_state.json is from step {step}"
    except (ValueError, KeyError, TypeError):
        return "trainer_state.json is damaged"
    _, problems = read_header(checkpoint / ADAPTER)
    return problems[0].removeprefix(f"{checkpoint}/") if problems else None


def publish(temporary: Path, final: Path) -> None:
    """Syncs a finished folder's files to the disk and renames it to `final`, which it replaces."""
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
