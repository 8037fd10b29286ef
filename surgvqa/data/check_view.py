"""Shows the findings of `check-data` on the terminal: label balance, notes, problems."""

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
from surgvqa.untrusted import one_line, printable

SHOWN = 10
"""Problems of each kind to show; the others are counted. --json has all of them."""
BAR_CELLS = 20
COLOURS = ("cyan", "magenta", "yellow", "white")
SHADES = "━╍┈·"
"""Shades of the most frequent label, the second, the third, and all others; distinct without colour too."""


class CheckedFile(Protocol):
    """One JSONL file and what was found in it."""

    path: str
    samples: list[Sample]
    labels: dict[str, Counter[str]]


def show_file(console: Console, file: CheckedFile) -> None:
    """Shows the label balance of each question type as a bar of shades, the most frequent label first."""
    clips = len({sample.clip for sample in file.samples})
    console.print(Text.assemble((file.path, "bold"), f"  {len(file.samples):,} samples, {clips:,} clips"))
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("question type", no_wrap=True)
    table.add_column("samples", justify="right")
    table.add_column("balance", no_wrap=True)
    table.add_column("labels", overflow="fold")
    for kind, counts in sorted(file.labels.items()):
        ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        labels = one_line(" · ".join(f"{label} {count}" for label, count in ranked))
        only = ("one label only  " if len(ranked) == 1 else "", "yellow")
        bar = _coloured(_bar([n for _, n in ranked]))
        table.add_row(kind, str(counts.total()), bar, Text.assemble(only, labels))
    console.print(table)


def _bar(counts: Sequence[int]) -> str:
    """The counts as a bar of BAR_CELLS cells; each cell has the shade of the label at its middle."""
    total, ends = sum(counts), list(accumulate(counts))
    cells = ((cell + 0.5) / BAR_CELLS * total for cell in range(BAR_CELLS))
    labels = (next(i for i, end in enumerate(ends) if middle < end) for middle in cells)
    return "".join(SHADES[min(label, len(SHADES) - 1)] for label in labels)


def _coloured(bar: str) -> Text:
    """The bar with one colour per label."""
    parts = ("".join(group) for _, group in groupby(bar))
    return Text.assemble(*((part, COLOURS[SHADES.index(part[0])]) for part in parts))


def show_notes(console: Console, files: Sequence[CheckedFile], data: dict[str, Any]) -> None:
    """Shows findings that are not errors but affect how to read a score; remarkable ones have a yellow bullet."""

    def note(text: str, remarkable: bool = False) -> None:
        console.print(Text.assemble(("•", "yellow" if remarkable else ""), f" {text}"))

    several = len(files) > 1
    by_file = ", ".join(f"{_name(f['file'])} {100 * f['majority_accuracy']:.1f} %" for f in data["files"])
    note(
        f"majority accuracy (a blind guess by question type): {100 * data['majority_accuracy']:.1f} %"
        + (f" ({by_file})" if several else "")
    )
    within = data["id_collisions_within"]
    inside = f", {within} of them inside one file" if several else ""
    example = f", as {data['colliding_ids'][0]}" if data["colliding_ids"] else ""
    note(f"ids that stand for more than one question: {data['id_collisions']}{inside}{example}", within > 0)
    if several:
        clips, frames = data["shared_clips"], data["shared_frames"]
        example = f", as {data['shared_frames_examples'][0]}" if frames else ""
        note(f"clips in more than one file: {clips:,} (frames in more than one file: {frames:,}{example})", frames > 0)
    for file, found in zip(files, data["files"]):
        if kinds := found["single_label_types"]:
            note(f"question types with a single label in {_name(file.path)}: {len(kinds)} of {len(file.labels)}", True)
    for found in data["files"]:
        where = f" of {_name(found['file'])}" if several else ""
        note(
            f"independent clips{where}: {found['clusters']:,} clusters of {found['samples']:,} samples (a cluster:"
            " clips of one video that overlap or lie within a second)",
            2 * found["clusters"] < found["samples"],
        )
    for found in data["files"]:
        kinds, asked = len(found["wordings"]), sum(found["wordings"].values())
        where = f" of {_name(found['file'])}" if several else ""
        one_each = (
            f", one for each type: the model needs to tell only {asked} sentences apart" if asked == kinds > 0 else ""
        )
        note(f"different wordings{where}: {asked:,} for {kinds} question types{one_each}", bool(one_each))
    if several:
        unseen = sum(data["unseen_wordings"].values())
        note(f"wordings of the later files that {_name(files[0].path)} does not have: {unseen:,}", unseen == 0)
    for key, text in (
        ("duplicates_list", "samples that repeat another sample's question about the same frames"),
        ("contradictions_list", "samples among these with a different label"),
        ("frames_out_of_order_list", "samples whose frame numbers are not in rising order"),
        ("answers_without_label_list", "reference answers that do not contain their label"),
    ):
        if places := data[key]:
            note(f"{text}: {len(places):,}, as {places[0]}", True)
    if seen := data["visibility"]:
        note(
            f"labels of the lesion's place and motion that the boxes support: {seen['supported']:,} of "
            f"{seen['samples']:,}; {seen['contradicted']:,} contradicted, {seen['not_shown']:,} not shown",
            seen["supported"] < seen["samples"],
        )
        for one in seen["list"][:SHOWN]:
            longer = f"; shown by frames {one['window'][0]} to {one['window'][1]}" if one["window"] else ""
            text = f"    {one['place']}: {one['label']}, {one['shows']} ({one['verdict'].replace('_', ' ')}{longer})"
            console.print(Text(printable(text), "dim"), soft_wrap=True)
        if len(seen["list"]) > SHOWN:
            console.print(f"    … and {len(seen['list']) - SHOWN:,} more (--json lists them all)")
    if data["not_checked"]:
        note(f"not looked at: {' and '.join(data['not_checked'])}", True)


def show_replay(console: Console, replayed: dict[str, Any]) -> None:
    """Shows what the samples of an old run heard and saw."""
    console.print()
    console.print(Text.assemble(("as trained", "bold"), printable(f"  by {replayed['file']}")))
    for row in replayed["files"]:
        n = row["samples"]
        console.print(Text(printable(f"{row['file']}: {n:,} samples, sound of {row['audio_dir']}")))
        for key, text in (
            ("own", "heard their question"),
            ("other_wording", "heard their question in the other template's wording"),
            ("another", "heard another sample's question"),
            ("unclear", "share a recording with another question"),
            ("silence", "heard two seconds of silence"),
            ("with_black_frames", "saw black frames"),
            ("all_black", "saw only black frames"),
        ):
            if row[key] or key == "own":
                share = f"{100 * row[key] / n:.1f} %" if n else ""
                least = row["unclear_wrong_at_least"] if key == "unclear" else 0
                more = f", of which at least {least:,} heard another sample's question" if least else ""
                style = "green" if key == "own" else "red"
                console.print(Text.assemble((f"  {row[key]:>6,}", style), f" {share:>7} {text}{more}"))
        for text in row["examples"]:
            console.print(Text(printable(f"    {text}"), "dim"), soft_wrap=True)


def _name(path: str) -> str:
    return Path(path).name


def show_problems(console: Console, kinds: Sequence[tuple[str, Sequence[str]]], good: str) -> None:
    """Shows each kind of problem, (title, texts), and counts those beyond the first ten; `good` if there are none."""
    for title, texts in kinds:
        if texts:
            console.print(Text(f"{len(texts):,} {title}", "red"))
            for text in texts[:SHOWN]:
                console.print(Text(f"  {printable(text)}"), soft_wrap=True)
            if len(texts) > SHOWN:
                console.print(f"  … and {len(texts) - SHOWN:,} more (--json lists them all)")
    if not any(texts for _, texts in kinds):
        console.print(Text(good, "green"))
