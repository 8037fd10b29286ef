"""Presets: named overrides as TOML files, and the order in which a run retreats through them.

A file holds `reason` (why one would choose it), `gives_up` (what it costs), `rung` (its place on the ladder of retreat,
0 first; absent = not on the ladder) and `[settings]`, keys of the training options. A workspace may bring its own in
`<workspace>/presets/`: they are listed first, and when any of them has a rung, they are the ladder.
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
    """A preset file that cannot be used; the text names the file and the key."""


def load_presets(workspace: Path | None = None) -> list[Preset]:
    """All presets, the workspace's own first, each group by rung and then by name."""
    own = _read_folder(workspace / "presets") if workspace else []
    names = {p.name for p in own}
    return own + [p for p in _read_folder(BUILT_IN) if p.name not in names]


def ladder(workspace: Path | None = None) -> list[Preset]:
    """The presets of the retreat, from the first choice to the last resort."""
    presets = load_presets(workspace)
    own = [p for p in presets if p.rung is not None and p.file.parent != BUILT_IN]
    return own or [p for p in presets if p.rung is not None]


def _read_folder(folder: Path) -> list[Preset]:
    files = sorted(folder.glob("*.toml")) if folder.is_dir() else []
    return sorted((_read(file) for file in files), key=lambda p: (p.rung is None, p.rung, p.name))


def _read(file: Path) -> Preset:
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
        unknown = set(document) - {"reason", "gives_up", "rung", "settings"}
        if unknown:
            raise KeyError(f"unknown key {sorted(unknown)[0]}")
        return Preset(
            file.stem, document["reason"], document["gives_up"], document.get("rung"), dict(document["settings"]), file
        )
    except (tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise PresetError(f"{file}: {error}") from None
