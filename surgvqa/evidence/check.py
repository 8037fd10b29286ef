"""Checks evidence again: what still matches, what has changed, and what is not on this machine."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.evaluation.score import read_predictions, score
from surgvqa.evaluation.sources import PREDICTIONS
from surgvqa.evidence.pack import CLUSTERS, MANIFEST, SCORES, SUMS, options_of
from surgvqa.files import read_json, read_text, sha256_file
from surgvqa.provenance.hashes import Hashes
from surgvqa.provenance.record import hash_inputs

SUM = re.compile(r"([0-9a-f]{64})  (.+)")
HOLDS, BROKEN = ("same",), ("changed", "missing", "added", "unreadable")


@dataclass(frozen=True)
class Finding:
    """The result of checking one item."""

    what: str
    state: str
    """same; changed, missing, added, unreadable; or "not here" for inputs that are not on this machine."""
    detail: str = ""


def check_evidence(folder: Path) -> list[Finding]:
    """All findings. Raises UsageError when `folder` is not a folder of evidence."""
    if not (folder / SUMS).is_file():
        raise UsageError(f"{folder}: no {SUMS}, expected a folder made by `surgvqa evidence`")
    return [*_files(folder), *_scores(folder), *_inputs(folder)]


def _files(folder: Path) -> Iterator[Finding]:
    listed = {}
    for number, line in enumerate(read_text(folder / SUMS).splitlines(), 1):
        match = SUM.fullmatch(line)
        if not match or Path(match[2]).is_absolute() or ".." in Path(match[2]).parts:
            raise UsageError(f"{folder / SUMS}:{number}: expected a sha256 and the name of a file in this folder")
        listed[match[2]] = match[1]
    for name, expected in listed.items():
        file = folder / name
        if not file.is_file():
            yield Finding(name, "missing")
            continue
        try:
            yield Finding(name, "same" if sha256_file(file) == expected else "changed")
        except OSError as error:
            yield Finding(name, "unreadable", error.strerror or "")
    here = (path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / SUMS)
    for path in here:
        if str(path.relative_to(folder)) not in listed:
            yield Finding(str(path.relative_to(folder)), "added", "not in SHA256SUMS")


def _scores(folder: Path) -> Iterator[Finding]:
    """Computes the scores of each evaluation again from its predictions."""
    try:
        recorded, clusters = read_json(folder / SCORES), read_json(folder / CLUSTERS)
    except UsageError as error:
        yield Finding("scores", "unreadable", str(error))
        return
    for run, report in recorded.items():
        what = f"scores of {run}"
        try:
            predictions = read_predictions(folder / "runs" / Path(run).name / PREDICTIONS)
            groups = clusters.get(run)
            if groups is not None and (not isinstance(groups, list) or len(groups) != len(predictions)):
                raise UsageError(f"{CLUSTERS}: expected a cluster for each of the {len(predictions)} predictions")
            again = json.loads(json.dumps(score(predictions, clusters=groups)))
        except (SurgvqaError, TypeError) as error:
            yield Finding(what, "unreadable", str(error))
            continue
        differing = [
            key for key in again if not _matches(again[key], report.get(key) if isinstance(report, dict) else None)
        ]
        yield Finding(what, "changed" if differing else "same", ", ".join(differing))


def _matches(mine: Any, theirs: Any) -> bool:
    """Whether `theirs` has everything in `mine`, with floats equal up to rounding.

    Only `theirs` may have a training majority.
    """
    if isinstance(mine, dict):
        return isinstance(theirs, dict) and all(_matches(value, theirs.get(key)) for key, value in mine.items())
    if isinstance(mine, list):
        return isinstance(theirs, list) and len(mine) == len(theirs) and all(map(_matches, mine, theirs))
    if isinstance(mine, float) and isinstance(theirs, (int, float)):
        return math.isclose(mine, theirs, rel_tol=1e-9, abs_tol=1e-12)
    return bool(mine == theirs)


def _inputs(folder: Path) -> Iterator[Finding]:
    """Reads data, frames, recordings and weights on this machine again and compares their hashes."""
    try:
        runs = read_json(folder / MANIFEST).get("runs")
    except UsageError as error:
        yield Finding("inputs", "unreadable", str(error))
        return
    hashes = Hashes()
    for run in runs if isinstance(runs, list) else []:
        if not isinstance(run, dict):
            continue
        recorded, outputs = (run[key] if isinstance(run.get(key), dict) else {} for key in ("inputs", "outputs"))
        unreadable: list[str] = []
        again = hash_inputs(options_of(run), hashes, unreadable.append)
        for name, row in recorded.items():
            why = next((text for text in unreadable if text.startswith(f"{name}: ")), "")
            yield _compare_hash(f"{run.get('id')}: {name}", row, again.get(name, {}).get("sha256"), why)
        for name, row in outputs.items():
            path = Path(str(row.get("path"))) if isinstance(row, dict) else Path()
            try:
                found = hashes.of_weights(path) if path.is_dir() else None
            except OSError as error:
                yield Finding(f"{run.get('id')}: {name}", "unreadable", error.strerror or "")
                continue
            yield _compare_hash(f"{run.get('id')}: {name}", row, found)


def _compare_hash(what: str, row: Mapping[str, Any], found: str | None, why: str = "") -> Finding:
    """`why`: why it could not be hashed; if empty and `found` is None, the files that were hashed are unknown."""
    path = str(row.get("path", "")) if isinstance(row, dict) else ""
    if found is None:
        partly = why and path and Path(path).exists()
        return Finding(what, "changed", why) if partly else Finding(what, "not here", path)
    return Finding(what, "same" if found == row.get("sha256") else "changed", path)
