"""The checkpoint-<step> folders of a training: listed, judged, put aside, published."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import zipfile
from pathlib import Path

ADAPTER = "adapter_model.safetensors"
RESUME_FILES = (ADAPTER, "trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth")
"""What a checkpoint must have to be resumed from."""


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint-<step> folders, newest step first."""
    found = [p for p in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]), reverse=True)


def newest_whole_checkpoint(output_dir: Path) -> tuple[Path | None, list[str]]:
    """(the newest checkpoint that can be resumed from, why each newer one cannot)."""
    skipped: list[str] = []
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
        with open(checkpoint / ADAPTER, "rb") as weights:
            header_size = int.from_bytes(weights.read(8), "little")
            header = json.loads(weights.read(header_size))
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
