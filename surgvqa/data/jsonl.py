"""Reads JSONL, one JSON object per line, in the same way for samples and for predictions.

Tolerates a byte order mark, CRLF and blank lines at the end. U+2028, U+0085 and the like inside a string do not end a
line. Every other error is a Problem with its line.
"""

from __future__ import annotations

import codecs
import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgvqa.errors import UsageError
from surgvqa.untrusted import is_kind, json_kind, printable

SURROGATE = re.compile("[\ud800-\udfff]")
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with a line."""

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}"


class BadLine(Exception):
    """Why a line is invalid."""


class BlankLine(BadLine):
    """A blank line between others."""


def read_objects(path: str | os.PathLike[str], expected: str) -> Iterator[tuple[int, dict[str, Any] | BadLine]]:
    """Yields (line number, its object or BadLine). `expected` describes the file, for messages.

    Raises UsageError when the file cannot be read, is empty or is not UTF-8.
    """
    file = os.fspath(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode) and not os.path.isdir(path):  # reading a pipe may never end
            raise UsageError(f"{printable(file)}: not a regular file, expected {expected}; save it first")
        content = Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"{printable(file)}: {error.strerror or error}, expected {expected}") from None
    except ValueError as error:  # a NUL byte in the path
        raise UsageError(f"{file!r}: {error}, expected {expected}") from None
    if content.startswith(UTF16):
        raise UsageError(f"{printable(file)}: the text is UTF-16, expected UTF-8; save it again as UTF-8")
    lines = content.removeprefix(codecs.BOM_UTF8).rstrip().split(b"\n")
    if lines == [b""]:
        raise UsageError(f"{printable(file)}: empty, expected one JSON object per line")
    for number, line in enumerate(lines, 1):
        try:
            yield number, _object(line)
        except BadLine as bad:
            yield number, bad


def text_field(record: dict[str, Any], field: str, *, numbers: bool = False, empty: bool = False) -> str:
    """The text of a field. Raises BadLine when it is missing or of another type.

    `numbers` allows a number, which becomes text. `empty` allows empty text.
    """
    if field not in record:
        raise BadLine(f"{field} is missing, expected text")
    value = record[field]
    if numbers and is_kind(value, "a number"):
        return json.dumps(value)
    if not isinstance(value, str):
        raise BadLine(f"{field} is {json_kind(value)}, expected text")
    if not value.strip() and not empty:
        raise BadLine(f"{field} is empty, expected text")
    return value


def _object(line: bytes) -> dict[str, Any]:
    if not line.strip():
        raise BlankLine("the line is blank, expected a JSON object")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadLine(f"byte {error.start + 1} is not UTF-8, expected UTF-8 text") from None
    try:
        record = DECODER.decode(text)
        surrogate = _with_surrogate(record) if "\\u" in text else None  # only an escape can produce one
    except json.JSONDecodeError as error:
        raise BadLine(f"not JSON: {error.msg} at column {error.colno}, expected one JSON object per line") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets thousands deep
        raise BadLine(f"not valid JSON: {error}") from None
    if not isinstance(record, dict):
        raise BadLine(f"the line is {json_kind(record)}, expected a JSON object")
    if surrogate is not None:
        raise BadLine(f"{printable(surrogate)} holds half of a surrogate pair, expected text")
    return record


def _with_surrogate(record: Any) -> str | None:
    """The first field of an object, at any depth, that contains half of a surrogate pair; None if there is none."""
    fields = record.items() if isinstance(record, dict) else ()
    return next((key for key, value in fields if SURROGATE.search(json.dumps([key, value], ensure_ascii=False))), None)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs as an object. Raises BadLine for a repeated key, of which json would silently use the last."""
    record = dict(pairs)
    if len(record) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise BadLine(f"{printable(key)} is given twice, expected each key once")
            seen.add(key)
    return record


DECODER = json.JSONDecoder(object_pairs_hook=_without_repeats)
"""Created once, because json.loads would create one for each line."""
