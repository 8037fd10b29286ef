"""`surgvqa split`: divides samples into train, eval and test files that share no video, cluster or clip.

Lines are copied byte for byte. The split depends neither on the order of the files nor on ids, because an id may stand
for different questions in different videos.
"""

from __future__ import annotations

import codecs
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from surgvqa.config.preparing import SplitOptions
from surgvqa.config.workspace import Workspace
from surgvqa.data.clusters import clusters_of
from surgvqa.data.samples import Sample, read_samples
from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.files import write_synced
from surgvqa.outcome import Outcome
from surgvqa.prepare.divide import divide, groups_of
from surgvqa.terminal.drawing import plain
from surgvqa.untrusted import one_line

SIDES = ("train", "eval", "test")
OFF = 0.05
"""Largest difference between a side's share and the requested one without a warning."""
LABELS_SHOWN = 8
"""Labels to show for each question type; --json has all of them."""


@dataclass
class Side:
    """One of the output files and its samples."""

    name: str
    file: Path
    wanted: float
    """Requested share of the samples, 0..1."""
    samples: list[Sample]
    lines: list[bytes]
    clusters: int


def run(options: SplitOptions, workspace: Workspace) -> Outcome:
    """Reads and divides the samples, then writes all files or none."""
    shares = {"train": 1 - options.eval_share - options.test_share, "eval": options.eval_share}
    if options.test_share:
        shares["test"] = options.test_share
    if shares["train"] < 1e-9:
        raise UsageError(
            f"eval_share {options.eval_share:g} and test_share {options.test_share:g} leave no training samples, "
            "expected a sum below 1"
        )
    folder = Path(options.output)
    inputs = sorted({os.path.realpath(file): file for file in options.files}.items())
    there = _check_output(folder, [real for real, _ in inputs], options.force)
    samples, lines = _read([file for _, file in inputs])

    groups = groups_of(samples, options.by)
    if len(groups) < len(shares):
        raise UsageError(_too_few(options.by, len(groups), len(shares), samples))
    clusters = clusters_of(samples)
    names = list(shares)
    taken: list[list[int]] = [[] for _ in names]
    for group, side in zip(groups, divide(samples, groups, list(shares.values()), options.split_seed)):
        taken[side] += group
    sides = [
        Side(
            name,
            folder / f"{name}.jsonl",
            shares[name],
            [samples[index] for index in sorted(indices)],
            [lines[index] for index in sorted(indices)],
            len({clusters[index] for index in indices}),
        )
        for name, indices in zip(names, taken)
    ]
    _write(folder, {side.file: b"".join(side.lines) for side in sides}, there)
    data = _summary(options, sides)
    return Outcome(data, show=lambda console: _show(console, data))


# --- reading ----------------------------------------------------------------------------------------------------------


def _check_output(folder: Path, inputs: Sequence[str], force: bool) -> list[Path]:
    """The files of an earlier split to replace. Raises UsageError without --force, or when the folder is missing."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"output: {folder} is a file, expected a folder")
    if not folder.absolute().parent.is_dir():
        raise UsageError(f"output: {folder.absolute().parent}: no such folder")
    files = [folder / f"{name}.jsonl" for name in SIDES]
    there = [file for file in files if os.path.lexists(file)]
    for file in there:
        if file.is_dir():
            raise UsageError(f"{file}: a folder, expected a file or nothing")
        if os.path.realpath(file) in inputs:
            raise UsageError(f"{file} is one of the files to split and would be replaced; name another --output")
    if there and not force:
        raise UsageError(f"{there[0]} already exists; name another --output, or replace the earlier split with --force")
    return there


def _read(files: Sequence[str]) -> tuple[list[Sample], list[bytes]]:
    """(samples of all files, the raw line of each with its line ending)."""
    samples: list[Sample] = []
    lines: list[bytes] = []
    for file in files:
        found = read_samples(file)
        content = Path(file).read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
        if len(content) < found[-1].line:
            raise SurgvqaError(f"{file}: the file changed while it was read; try again")
        samples += found
        lines += [content[sample.line - 1] + b"\n" for sample in found]
    return samples, lines


def _too_few(by: str, groups: int, sides: int, samples: Sequence[Sample]) -> str:
    if by == "video" and groups == 1:
        return (
            f"all {len(samples):,} samples come from one video, {samples[0].video_id}, which would be in train and "
            "eval; --by cluster divides it between clips that are more than a second apart"
        )
    what = "video" if by == "video" else "cluster of clips within a second of each other"
    return f"{groups} {what}{'s' * (groups > 1 and by == 'video')} for {sides} files, expected at least one each" + (
        "; --by cluster divides videos" if by == "video" else ""
    )


# --- writing ----------------------------------------------------------------------------------------------------------


def _write(folder: Path, contents: dict[Path, bytes], there: Sequence[Path]) -> None:
    """Writes all files or none. The earlier files `there` are all removed, or all kept after an error."""
    new = not folder.exists()
    beside = {file: file.with_name(f".{file.name}.{os.getpid()}.tmp") for file in contents}
    aside: dict[Path, Path] = {}
    placed: list[Path] = []
    try:
        folder.mkdir(exist_ok=True)
        for file, content in contents.items():
            write_synced(beside[file], content)
        for file in there:
            old = file.with_name(f".{file.name}.{os.getpid()}.old")
            os.rename(file, old)
            aside[file] = old
        for file in contents:
            os.rename(beside[file], file)
            placed.append(file)
    except BaseException as error:
        for file in (*placed, *beside.values()):
            file.unlink(missing_ok=True)
        for file, old in aside.items():
            os.rename(old, file)
        if new and folder.is_dir():
            folder.rmdir()
        if isinstance(error, OSError):
            raise SurgvqaError(f"{folder}: cannot be written: {error.strerror}; nothing was changed") from None
        raise
    for old in aside.values():
        old.unlink()


# --- saying what was reached ------------------------------------------------------------------------------------------


def _summary(options: SplitOptions, sides: Sequence[Side]) -> dict[str, Any]:
    total = sum(len(side.samples) for side in sides)
    counts = {side.name: Counter((s.question_type, s.label) for s in side.samples) for side in sides}
    types: dict[str, Any] = {}
    for kind, label in sorted({key for count in counts.values() for key in count}):
        labels = types.setdefault(kind, {"sides": dict.fromkeys(counts, 0), "labels": {}})
        labels["labels"][label] = {name: count[kind, label] for name, count in counts.items()}
        for name, count in counts.items():
            labels["sides"][name] += count[kind, label]
    return {
        "output": str(options.output),
        "by": options.by,
        "split_seed": options.split_seed,
        "samples": total,
        "sides": {
            side.name: {
                "file": str(side.file),
                "samples": len(side.samples),
                "share": len(side.samples) / total,
                "wanted_share": side.wanted,
                "clusters": side.clusters,
                "videos": sorted({sample.video_id for sample in side.samples}),
            }
            for side in sides
        },
        "by_type": types,
        "warnings": _warnings(options.by, sides, types, total),
    }


def _warnings(by: str, sides: Sequence[Side], types: dict[str, Any], total: int) -> list[str]:
    """Warnings on what the split could not achieve."""
    found = []
    for side in sides:
        if abs(len(side.samples) / total - side.wanted) > OFF:
            found.append(
                f"{side.name} has {100 * len(side.samples) / total:.1f} % of the samples instead of "
                f"{100 * side.wanted:.1f} %: a {by} is not divided" + ("; try --by cluster" if by == "video" else "")
            )
        if lacking := [kind for kind, row in types.items() if not row["sides"][side.name]]:
            found.append(f"{side.name} has no sample of {_first_names(lacking)}")
    for side in sides[1:]:
        unknown = [
            f"{kind}: {label}"
            for kind, row in types.items()
            for label, count in row["labels"].items()
            if count[side.name] and not count["train"]
        ]
        if unknown:
            found.append(f"{side.name} has labels that train does not have: {_first_names(unknown)}")
    shared = {s.video_id for s in sides[0].samples} & {s.video_id for side in sides[1:] for s in side.samples}
    if shared:
        found.append(
            f"{len(shared)} video{'s are' if len(shared) > 1 else ' is'} in more than one file (--by cluster): a score "
            "says nothing about unseen videos"
        )
    return found


def _first_names(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _show(console: Console, data: dict[str, Any]) -> None:
    sides = data["sides"]
    files = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
    files.add_column("file", overflow="fold")
    for heading in ("samples", "%", "clusters", "videos"):
        files.add_column(heading, justify="right", no_wrap=True)
    for side in sides.values():
        share = f"{100 * side['share']:.1f}"
        numbers = (f"{side['samples']:,}", share, f"{side['clusters']:,}", str(len(side["videos"])))
        files.add_row(plain(side["file"]), *numbers)
    console.print(files)
    balance = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
    balance.add_column("question type, label", overflow="fold")
    for name in sides:
        balance.add_column(name, justify="right", no_wrap=True)
    for name in list(sides)[1:]:
        balance.add_column(f"{name} %", justify="right", no_wrap=True)

    def add(title: str, counts: dict[str, int], style: str = "") -> None:
        total = sum(counts.values())
        shares = (f"{100 * counts[name] / total:.0f}" for name in list(sides)[1:])
        balance.add_row(plain(one_line(title)), *(f"{n:,}" for n in counts.values()), *shares, style=style)

    for kind, row in data["by_type"].items():
        add(kind, row["sides"])
        ranked = sorted(row["labels"].items(), key=lambda item: (-sum(item[1].values()), item[0]))
        for label, counts in ranked[:LABELS_SHOWN]:
            add(f"  {label}", counts, style="dim")
        if len(ranked) > LABELS_SHOWN:
            balance.add_row(f"  and {len(ranked) - LABELS_SHOWN:,} more labels (--json lists them)", style="dim")
    console.print(balance)
    for text in data["warnings"]:
        console.print(plain(one_line(text)), style="yellow")
