"""Presets: named overrides as TOML files, and the order in which a run steps down through them.

A file contains `reason` (why to choose it), `gives_up` (what it costs), `rung` (its position in the order, 0 first; no
run steps down to a preset without one) and `[settings]` (keys of the training options). A workspace may have presets of
its own in `<workspace>/presets/`. They are listed first, and if any has a rung, they replace the built-in order.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BUILT_IN = Path(__file__).parent


@dataclass(frozen=True)
class Preset:
    """One named set of overrides."""

    name: str
    reason: str
    gives_up: str
    rung: int | None
    settings: dict[str, Any]
    file: Path


class PresetError(ValueError):
    """A preset file cannot be used. The text names the file and the key."""


def load_presets(workspace: Path | None = None) -> list[Preset]:
    """All presets, with the workspace's own first. Both groups are sorted by rung and then by name."""
    own = _read_folder(workspace / "presets") if workspace else []
    names = {p.name for p in own}
    return own + [p for p in _read_folder(BUILT_IN) if p.name not in names]


def step_down_presets(workspace: Path | None = None) -> list[Preset]:
    """The presets with a rung, in the order in which a run steps down through them."""
    presets = load_presets(workspace)
    own = [p for p in presets if p.rung is not None and p.file.parent != BUILT_IN]
    return own or [p for p in presets if p.rung is not None]


def _read_folder(folder: Path) -> list[Preset]:
    files = sorted(folder.glob("*.toml")) if folder.is_dir() else []
    return sorted((_read(file) for file in files), key=lambda p: (p.rung is None, p.rung, p.name))


KEYS: dict[str, tuple[type, str]] = {
    "reason": (str, "text"),
    "gives_up": (str, "text"),
    "rung": (int, "a whole number"),
    "settings": (dict, "a table"),
}


def _read(file: Path) -> Preset:
    try:
        document = tomllib.loads(file.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise PresetError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not TOML, or not UTF-8
        raise PresetError(f"{file}: not valid TOML: {error}") from None
    if unknown := sorted(set(document) - set(KEYS)):
        raise PresetError(f"{file}: unknown key {unknown[0]}, expected {', '.join(KEYS)}")
    for key, (kind, expected) in KEYS.items():
        if key not in document and key != "rung":
            raise PresetError(f"{file}: {key} is missing, expected {expected}")
        value = document.get(key)
        if key in document and (not isinstance(value, kind) or isinstance(value, bool)):
            raise PresetError(f"{file}: {key} is {value!r}, expected {expected}")
    settings = document["settings"]
    return Preset(file.stem, document["reason"], document["gives_up"], document.get("rung"), settings, file)
