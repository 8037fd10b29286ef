"""The file of paraphrases: several wordings of each question type, and held-out ones.

[wordings]
nbi_status = ["Is the NBI light on?", "Are the frames using NBI?"]

[held_out]
nbi_status = ["Are these frames captured using NBI mode?"]
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgvqa.config.settings import nearest
from surgvqa.data.samples import Sample, shortened, wording_of
from surgvqa.errors import UsageError
from surgvqa.files import read_text
from surgvqa.untrusted import json_kind, printable

TABLES = ("wordings", "held_out")


@dataclass(frozen=True)
class Wordings:
    """{question type: its wordings}, known and held out; empty if questions are spoken as written."""

    known: dict[str, list[str]] = field(default_factory=dict)
    held_out: dict[str, list[str]] = field(default_factory=dict)


def read_wordings(file: str, samples: Iterable[Sample]) -> Wordings:
    """Reads the file. Every question type of the samples needs wordings.

    Raises UsageError, which names file and type, for invalid TOML, an unknown key, an empty list, and a wording that
    occurs twice or in both tables.
    """
    try:
        document = tomllib.loads(read_text(Path(file)))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{file}: not TOML: {error}") from None
    for key in document:
        if key not in TABLES:
            raise UsageError(f"{file}: unknown key {shortened(key)}, expected [wordings] and [held_out]")
    if "wordings" not in document:
        raise UsageError(f"{file}: the table [wordings] is missing")
    known, held_out = (_table(file, name, document.get(name, {})) for name in TABLES)
    first = {sample.question_type: sample for sample in reversed(list(samples))}
    for name, table in (("wordings", known), *([("held_out", held_out)] if held_out else [])):
        if lacking := sorted(set(first) - set(table)):
            others = f" (nor {len(lacking) - 1} more)" if len(lacking) > 1 else ""
            raise UsageError(
                f"{file}: [{name}] has no question type {lacking[0]}{others}, as {first[lacking[0]].place} is"
                f"{nearest(lacking[0], set(table) - set(first))}"
            )
    for kind, texts in held_out.items():
        both = {wording_of(text) for text in known.get(kind, [])} & {wording_of(text) for text in texts}
        if both:
            raise UsageError(
                f"{file}: {printable(kind)}: {shortened(min(both))} is in [wordings] and in [held_out], expected in one"
            )
    return Wordings(known, held_out)


def _table(file: str, name: str, table: Any) -> dict[str, list[str]]:
    if not isinstance(table, dict):
        raise UsageError(f"{file}: {name} is {json_kind(table)}, expected a table of lists of wordings")
    return {kind: _texts(f"{file}: [{name}] {printable(kind)}", texts) for kind, texts in table.items()}


def _texts(where: str, texts: Any) -> list[str]:
    if not isinstance(texts, list) or not texts:
        raise UsageError(f"{where} is {'empty' if texts == [] else json_kind(texts)}, expected a list of wordings")
    found: dict[str, str] = {}
    for text in texts:
        if not isinstance(text, str):
            raise UsageError(f"{where} holds {json_kind(text)}, expected text")
        spoken = pronounceable(text)
        if spoken is None:
            raise UsageError(f"{where} holds {shortened(text)}, expected pronounceable words")
        if wording_of(spoken) in found:
            raise UsageError(f"{where} has {shortened(spoken)} twice, expected different wordings")
        found[wording_of(spoken)] = spoken
    return list(found.values())


def pronounceable(text: str) -> str | None:
    """`text` without extra spaces; None if it has no word or has an unpronounceable character."""
    spoken = " ".join(text.split())
    return spoken if spoken.isprintable() and any(c.isalnum() for c in spoken) else None
