"""The findings of `check-data` as people read them: label balance, notes, problems."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table
from rich.text import Text

from surgvqa.data.samples import Sample
from surgvqa.untrusted import printable

SHOWN = 10
"""Problems of one kind that people are shown; the rest is counted. --json has them all."""
BAR_CELLS = 20
COLOURS = ("cyan", "magenta", "yellow", "white")
SHADES = "━╍┈·"
"""How the most frequent label is drawn, the second, the third, and all others: told apart without colour too."""


class CheckedFile(Protocol):
    """One JSONL file and what was found in it."""

    path: str
    samples: list[Sample]
    labels: dict[str, Counter[str]]


def show_file(console: Console, file: CheckedFile) -> None:
    """Label balance by question type: a bar in which each label has its shade, most frequent first."""
    clips = len({sample.clip for sample in file.samples})
    console.print(Text.assemble((file.path, "bold"), f"  {len(file.samples):,} samples, {clips:,} clips"))
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("question type", no_wrap=True)
    table.add_column("samples", justify="right")
    table.add_column("balance", no_wrap=True)
    table.add_column("labels", overflow="fold")
    for kind, counts in sorted(file.labels.items()):
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        labels = printable(" · ".join(f"{label} {count}" for label, count in ranked))
        only = ("one label only  " if len(ranked) == 1 else "", "yellow")
        bar = _coloured(_bar([n for _, n in ranked]))
        table.add_row(kind, str(counts.total()), bar, Text.assemble(only, labels))
    console.print(table)


def _bar(counts: Sequence[int]) -> str:
    """Shares as one bar of BAR_CELLS cells; each cell takes the shade of the label at its middle."""
    total, ends = sum(counts), list(accumulate(counts))
    cells = ((cell + 0.5) / BAR_CELLS * total for cell in range(BAR_CELLS))
    labels = (next(i for i, end in enumerate(ends) if middle < end) for middle in cells)
    return "".join(SHADES[min(label, len(SHADES) - 1)] for label in labels)


def _coloured(bar: str) -> Text:
    """The bar with a colour a label."""
    parts = ("".join(group) for _, group in groupby(bar))
    return Text.assemble(*((part, COLOURS[SHADES.index(part[0])]) for part in parts))


def show_notes(console: Console, files: Sequence[CheckedFile], data: dict[str, Any]) -> None:
    """What is no error but bears on what a score is worth; a yellow bullet where there is something to see."""

    def note(text: str, remarkable: bool = False) -> None:
        console.print(Text.assemble(("•", "yellow" if remarkable else ""), f" {text}"))

    several = len(files) > 1
    by_file = ", ".join(f"{_name(f['file'])} {100 * f['majority_accuracy']:.1f} %" for f in data["files"])
    note(
        f"majority accuracy (a blind guess by question type): {100 * data['majority_accuracy']:.1f} %"
        + (f" ({by_file})" if several else "")
    )
    within = sum(file["id_collisions"] for file in data["files"])
    inside = f", {within} of them inside one file" if several else ""
    example = f", as {data['colliding_ids'][0]}" if data["colliding_ids"] else ""
    note(f"ids that stand for more than one question: {data['id_collisions']}{inside}{example}", within > 0)
    if several:
        clips, frames = data["shared_clips"], data["shared_frames"]
        note(f"clips in more than one file: {clips:,} (frames in more than one file: {frames:,})", clips > 0)
    for file, found in zip(files, data["files"]):
        if kinds := found["single_label_types"]:
            note(f"question types with a single label in {_name(file.path)}: {len(kinds)} of {len(file.labels)}", True)
    for found in data["files"]:
        where = f" of {_name(found['file'])}" if several else ""
        note(
            f"independent clips{where}: {found['clusters']:,} clusters of {found['samples']:,} samples (clips of one"
            " video that overlap or lie within a second are one)",
            2 * found["clusters"] < found["samples"],
        )
    for found in data["files"]:
        kinds, asked = len(found["wordings"]), sum(found["wordings"].values())
        where = f" of {_name(found['file'])}" if several else ""
        one_each = f", one for each type: listening is telling {asked} sentences apart" if asked == kinds > 0 else ""
        note(f"different wordings{where}: {asked:,} for {kinds} question types{one_each}", bool(one_each))
    if several:
        unseen = sum(data["unseen_wordings"].values())
        note(f"wordings of the later files that {_name(files[0].path)} never has: {unseen:,}", unseen == 0)
    for key, text in (
        ("duplicates_list", "samples that repeat another's question about the same frames"),
        ("frames_out_of_order_list", "samples whose frame numbers do not rise"),
        ("answers_without_label_list", "reference answers that do not contain their label"),
    ):
        if places := data[key]:
            note(f"{text}: {len(places):,}, as {places[0]}", True)
    if data["not_checked"]:
        note(f"not looked at: {' and '.join(data['not_checked'])}", True)


def show_replay(console: Console, replayed: dict[str, Any]) -> None:
    """What the samples of an old run heard and saw."""
    console.print()
    console.print(Text.assemble(("as trained", "bold"), printable(f"  by {replayed['file']}")))
    for row in replayed["files"]:
        n = row["samples"]
        console.print(Text(printable(f"{row['file']}: {n:,} samples, sound of {row['audio_dir']}")))
        for key, text in (
            ("own", "heard their question"),
            ("other_wording", "heard their question in the other template's words"),
            ("another", "heard another sample's question"),
            ("unclear", "share a recording with another question"),
            ("silence", "heard two seconds of silence"),
            ("with_black_frames", "saw black frames"),
            ("all_black", "saw nothing but black frames"),
        ):
            if row[key] or key == "own":
                share = f"{100 * row[key] / n:.1f} %" if n else ""
                least = row["unclear_wrong_at_least"] if key == "unclear" else 0
                more = f", of whom {least:,} or more heard another's" if least else ""
                style = "green" if key == "own" else "red"
                console.print(Text.assemble((f"  {row[key]:>6,}", style), f" {share:>7} {text}{more}"))
        for text in row["examples"]:
            console.print(Text(printable(f"    {text}"), "dim"), soft_wrap=True)


def _name(path: str) -> str:
    return Path(path).name


def show_problems(console: Console, kinds: Sequence[tuple[str, Sequence[str]]], good: str) -> None:
    """(title, texts) of each kind: the first ten, the rest counted; `good` when there are none at all."""
    for title, texts in kinds:
        if texts:
            console.print(Text(f"{len(texts):,} {title}", "red"))
            for text in texts[:SHOWN]:
                console.print(Text(f"  {printable(text)}"), soft_wrap=True)
            if len(texts) > SHOWN:
                console.print(f"  … and {len(texts) - SHOWN:,} more (--json lists them all)")
    if not any(texts for _, texts in kinds):
        console.print(Text(good, "green"))
