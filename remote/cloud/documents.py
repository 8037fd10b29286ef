"""Reads what the ledger and the plans have written: a dataclass in a JSON file."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from surgvqa.files import read_json
from surgvqa.untrusted import of_kinds

T = TypeVar("T")


def read_as(kind: type[T], file: Path, kinds: dict[str, str]) -> tuple[T | None, str]:
    """The dataclass `kind` in `file` (None if a field is missing), and what is wrong with it ("": nothing).

    `kinds` has the kind of each field (untrusted.of_kinds). Fields that this version does not know are left out: a
    newer version may have written them. Raises UsageError for a file that is not JSON.
    """
    document, wrong = of_kinds(read_json(file), kinds)
    known = {one.name for one in fields(kind)}  # type: ignore[arg-type]  # a dataclass, by the contract
    values: dict[str, Any] = {key: value for key, value in document.items() if key in known}
    try:
        return kind(**values), wrong[0] if wrong else ""
    except TypeError as error:
        return None, wrong[0] if wrong else str(error).partition(" ")[2]
