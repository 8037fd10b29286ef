"""Where an entry of a timeline has its place: in the process's output, and in a file that it names."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path

from surgvqa.untrusted import one_line
from tui import words
from tui.follow.timeline import OUTPUT, Entry

AROUND = 12
LONGEST_LINE = 400
LAST_LINE = 1_000_000
NAMED = re.compile(r"([\w./@ -]{1,200}\.(?:jsonl?|toml|csv|py|txt)):(\d{1,7})")
"""`train.jsonl:17`."""


def output_around(entries: list[Entry], entry: Entry) -> tuple[Entry | None, list[Entry]]:
    """The line of output that says what an entry says, if one does, and the lines around it, else those before it."""
    lines = [other for other in entries if other.level == OUTPUT]
    said = " ".join(entry.text.split())
    same = [i for i, line in enumerate(lines) if line is entry or _say_the_same(line.text.strip(), said)]
    if same:
        at = same[-1]
        return lines[at], lines[max(0, at - AROUND) : at + 3]
    return None, [line for line in lines if line.order <= entry.order][-AROUND:]


def _say_the_same(line: str, said: str) -> bool:
    return len(line) > 12 and (line in said or said in line)


def source_line(text: str, root: Path | None) -> tuple[str, str] | None:
    """The line of a file in the workspace that a message names, with its number; None where it names none. Only files
    below `root` are opened: the message comes from outside."""
    found = NAMED.search(text)
    if found is None or root is None:
        return None
    file, number = Path(root, found[1].strip()).resolve(), int(found[2])
    if not file.is_relative_to(root.resolve()) or not file.is_file() or not 0 < number <= LAST_LINE:
        return None
    try:
        with open(file, encoding="utf-8", errors="replace") as lines:
            line = next(islice(lines, number - 1, None), None)
    except OSError:
        return None
    if line is None:
        return None
    return f"{words.short_path(file, root)}, line {number:,}", words.clip(one_line(line.rstrip("\n")), LONGEST_LINE)
