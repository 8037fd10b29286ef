"""Makes the folder of evidence from run folders.

    evidence.json           of each run: command line, options, versions, GPUs, commit, hashes of inputs and outputs
    scores.json             of each evaluation: the report of `evaluate`, with intervals and baselines
    clusters.json           the cluster of each prediction, so that the intervals can be recomputed without the data
    runs/<id>/run.json, events.jsonl, result.json, predictions.jsonl, curves.csv, utilisation.json
    README.md               the model card
    SHA256SUMS              hashes of all these files, in sha256sum's format

It contains no frames, recordings, JSONL files of samples, or logs.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgvqa.config.options import COMMAND_OPTIONS, EvaluateOptions
from surgvqa.config.settings import Path_, settings_of
from surgvqa.data.clusters import clusters_of
from surgvqa.data.samples import majority_labels, read_samples
from surgvqa.errors import UsageError
from surgvqa.evaluation.interval import samples_of
from surgvqa.evaluation.score import read_predictions, score
from surgvqa.evaluation.sources import PREDICTIONS
from surgvqa.files import sha256_file
from surgvqa.provenance.hashes import Hashes, weight_files
from surgvqa.runs.events import EventTail, finished_event
from surgvqa.runs.state import read_run_json, state_of

MANIFEST, SCORES, CLUSTERS, SUMS, CARD = "evidence.json", "scores.json", "clusters.json", "SHA256SUMS", "README.md"
COPIED = ("run.json", "events.jsonl", PREDICTIONS)
RECORDED = ("id", "command", "argv", "cwd", "started", "host", "preset", "options", "versions", "gpus", "git", "inputs")
CURVES = ("t", "kind", "step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm", "samples_per_s")


@dataclass
class Evidence:
    """The collected evidence before it is written."""

    runs: list[dict[str, Any]] = field(default_factory=list)
    """For each run: RECORDED keys of its run.json, `state`, `shell` (the command line), `outputs`, `result`."""
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    clusters: dict[str, list[int] | None] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    """{name in the folder: content}, without manifest, scores, card and sums."""
    notes: list[str] = field(default_factory=list)
    """Messages on what is missing."""


def collect(folders: list[Path], eval_data_path: str | None, train_data_path: str | None) -> Evidence:
    """Reads the run folders; the two files replace the runs' own if those are missing.

    Raises UsageError for a folder that is not a run, and for a run that has not ended.
    """
    found = Evidence()
    infos = [(folder, _run_json(folder)) for folder in folders]
    trained = (
        path for _, info in infos if info.get("command") == "train" and (path := option(info, "train_data_path"))
    )
    train_data_path = train_data_path or next((path for path in trained if Path(path).is_file()), None)
    training = None
    if train_data_path:
        training = {kind: label for kind, (label, _) in majority_labels(read_samples(train_data_path)).items()}
    for folder, info in infos:
        run = folder.name
        entry = {key: info[key] for key in RECORDED if key in info}
        entry["state"] = state_of(folder)
        entry["shell"] = "surgvqa " + shlex.join(map(str, info.get("argv", [])))
        entry["outputs"] = outputs_of(info, folder)
        entry["result"] = (finished_event(folder) or {}).get("result") or {}
        found.runs.append(entry)
        if "inputs" not in info:
            found.notes.append(f"{run}: its inputs were not hashed when it ran, so they cannot be checked")
        if info.get("git", {}).get("dirty"):
            found.notes.append(f"{run}: the code had uncommitted changes")
        for name in COPIED:
            if (folder / name).is_file():
                found.files[f"runs/{run}/{name}"] = (folder / name).read_bytes()
        events = EventTail(folder / "events.jsonl").read()
        found.files[f"runs/{run}/result.json"] = _json(entry["result"])
        found.files[f"runs/{run}/curves.csv"] = _curves(events)
        found.files[f"runs/{run}/utilisation.json"] = _json(_utilisation(events))
        if (folder / PREDICTIONS).is_file():
            predictions = read_predictions(folder / PREDICTIONS)
            own = option(info, "eval_data_path")
            clusters, note = _clusters(predictions, own if own and Path(own).is_file() else eval_data_path)
            found.notes += [f"{run}: {note}"] if note else []
            found.clusters[run] = clusters
            found.scores[run] = score(predictions, clusters=clusters, training=training)
    if not found.scores:
        found.notes.append("there is no run of `surgvqa evaluate`, so there are no scores")
    elif training is None:
        found.notes.append("the training's majority is unknown: name the training run, or --train_data_path")
    return found


def _run_json(folder: Path) -> dict[str, Any]:
    info = read_run_json(folder)
    if not info:
        raise UsageError(f"{folder}: no readable run.json, expected a run folder")
    if state_of(folder) in ("running", "starting"):
        raise UsageError(f"{folder.name} still runs; evidence needs runs that have ended")
    return info


def options_of(info: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved options of a run, with absolute paths."""
    known = settings_of(COMMAND_OPTIONS.get(str(info.get("command")), EvaluateOptions))
    options = {}
    for name, row in (info.get("options") or {}).items():
        value = row.get("value") if isinstance(row, dict) else None
        is_path = isinstance(value, str) and value and name in known and known[name].type is Path_
        options[name] = os.path.abspath(Path(info.get("cwd") or ".") / str(value)) if is_path else value
    return options


def option(info: Mapping[str, Any], name: str) -> str | None:
    """One option as text; None if it is not set."""
    value = options_of(info).get(name)
    return value if isinstance(value, str) and value else None


def outputs_of(info: Mapping[str, Any], folder: Path) -> dict[str, dict[str, Any]]:
    """{"weights": {"path", "sha256", "files"}} of a training's adapter or a merge's checkpoint; {} for other runs."""
    made = {"train": ("output_dir", "checkpoints"), "merge": ("output_path", "")}.get(str(info.get("command")))
    if made is None:
        return {}
    asked, usual = option(info, made[0]), folder / made[1]
    for path in ([Path(asked)] if asked else []) + ([usual] if made[1] else []):  # a fetched run contains them
        if path.is_dir() and (files := weight_files(path)):
            return {"weights": {"path": str(path), "sha256": Hashes().of_weights(path), "files": len(files)}}
    return {}


def _clusters(predictions: list[dict[str, Any]], path: str | None) -> tuple[list[int] | None, str]:
    if not path or not Path(path).is_file():
        return None, "the evaluation's samples are not on this machine, so the intervals are not clustered"
    samples = read_samples(path)
    cluster_of = {sample.line: number for sample, number in zip(samples, clusters_of(samples))}
    try:
        return [cluster_of[sample.line] for sample in samples_of(predictions, samples, path)], ""
    except UsageError as error:
        return None, f"the intervals are not clustered: {error}"


def _curves(events: list[dict[str, Any]]) -> bytes:
    """A CSV table of metric and eval events, one per row."""
    text = io.StringIO()
    rows = csv.DictWriter(text, CURVES, extrasaction="ignore", lineterminator="\n")
    rows.writeheader()
    rows.writerows(event for event in events if event.get("kind") in ("metric", "eval"))
    return text.getvalue().encode()


def _utilisation(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and maximum of the GPUs' figures, and the duration."""
    found: dict[str, Any] = {"samples": 0}
    if events:
        found["seconds"] = events[-1].get("t", 0) - events[0].get("t", 0)
    for name in ("utilization_percent", "power_w", "temperature_c", "process_bytes", "allocated_bytes", "used_bytes"):
        values = [e[name] for e in events if e.get("kind") == "gpu" and isinstance(e.get(name), (int, float))]
        if values:
            found[name] = {"mean": sum(values) / len(values), "max": max(values)}
            found["samples"] = max(found["samples"], len(values))
    return found


def _json(document: Any) -> bytes:
    return (json.dumps(document, indent=1, default=str, sort_keys=True) + "\n").encode()


def manifest(found: Evidence) -> bytes:
    """evidence.json."""
    return _json({"v": 1, "runs": found.runs, "notes": found.notes})


def scores_json(found: Evidence) -> bytes:
    """scores.json; the same predictions and clusters give the same bytes."""
    return _json(found.scores)


def write(found: Evidence, card: str, folder: Path) -> None:
    """Writes the folder, which must not exist. SHA256SUMS comes last, so a folder without it is incomplete."""
    files = {
        **found.files,
        MANIFEST: manifest(found),
        SCORES: scores_json(found),
        CLUSTERS: _json(found.clusters),
        CARD: card.encode(),
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    sums = "".join(f"{sha256_file(folder / name)}  {name}\n" for name in sorted(files))
    (folder / SUMS).write_text(sums)
