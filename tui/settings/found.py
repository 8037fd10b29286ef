"""What lies in a folder without surgvqa.toml that looks like the parts of a workspace."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

DEPTH = 3
MOST_FOLDERS = 400
MOST_FILES = 200
"""Looked at in one folder."""
FRAMES, SOUNDS = (".jpg", ".jpeg", ".png"), (".wav", ".mp3", ".flac", ".ogg")
NOT_OURS = ("runs", "node_modules", "__pycache__", "venv")


def found_settings(root: Path) -> dict[str, dict[str, str]]:
    """Settings by table ("" for all commands), each with a path relative to `root`: checkpoints and adapters by their
    config files, samples by their first line, frames and sound by what lies below a folder. Reads names and first
    lines only."""
    shared: dict[str, str] = {}
    merge: dict[str, str] = {}
    train: dict[str, str] = {}
    for folder, names in _folders(root):
        here = os.path.relpath(folder, root)
        if "adapter_config.json" in names:
            merge.setdefault("stage2_adapter_path", here)
        elif "merge_report.json" in names and "config.json" in names:
            train.setdefault("model_name_or_path", here)
        elif "config.json" in names and any(name.endswith((".safetensors", ".bin")) for name in names):
            merge.setdefault("stage1_model_path", here)
        for name in sorted(names):
            if name.endswith(".jsonl") and _has_samples(folder / name):
                which = (
                    "eval_data_path" if any(word in name for word in ("eval", "test", "out_")) else "train_data_path"
                )
                train.setdefault(which, os.path.join(here, name) if here != "." else name)
        for key, endings, word in (("frames_dir", FRAMES, "frame"), ("audio_dir", SOUNDS, "audio")):
            inside = any(name.lower().endswith(endings) for name in names)
            if inside and key not in shared:
                named = next((part for part in (folder, *folder.parents) if word in part.name.lower()), folder)
                place = named if named.is_relative_to(root) else folder
                shared[key] = os.path.relpath(place, root)
    found = {"": shared, "merge": merge, "train": train}
    return {table: values for table, values in found.items() if values}


def toml_of(found: dict[str, dict[str, str]]) -> str:
    """surgvqa.toml with what was found."""
    parts = ["# Made from what was found in this folder; every key is optional."]
    for table, values in found.items():
        parts += ["", f"[{table}]"] if table else []
        parts += [f"{name} = {json.dumps(path, ensure_ascii=False)}" for name, path in values.items()]
    return "\n".join(parts) + "\n"


def _folders(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Folders below `root` with the names of their files; not the hidden ones, and no links."""
    waiting, seen = [(root, 0)], 0
    while waiting and seen < MOST_FOLDERS:
        folder, depth = waiting.pop(0)
        seen += 1
        names: list[str] = []
        try:
            with os.scandir(folder) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    if entry.is_dir(follow_symlinks=False):
                        if depth < DEPTH and entry.name[0] != "." and entry.name not in NOT_OURS:
                            waiting.append((folder / entry.name, depth + 1))
                    elif len(names) < MOST_FILES:
                        names.append(entry.name)
        except OSError:
            continue
        yield folder, names


def _has_samples(file: Path) -> bool:
    try:
        with open(file, "rb") as lines:
            sample = json.loads(lines.readline(1 << 16))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(sample, dict) and {"question", "frames"} <= sample.keys()
