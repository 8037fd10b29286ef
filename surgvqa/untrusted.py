"""Text and JSON from outside (a host, a log, somebody's files), made safe to read and to show.

Standard library, Python 3.8: it travels to GPU hosts with the agent.
"""

from __future__ import annotations

import json
import re
from typing import Any

MAX_DEPTH = 50
"""Levels of lists and objects within each other that any document of ours stays well below."""
LARGEST = 1e300
"""What is beyond it, infinite or no number at all cannot be reckoned with."""
LAST_TIME = 253402300800.0
"""The year 10000: a time beyond it has no date."""
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
"""What a terminal obeys instead of showing it: control characters but newline and tab, changes of direction; and lone
surrogates, which no terminal can be sent."""
SEQUENCE = re.compile("\x1b(?:\\[[0-9:;<=>?]*[ -/]*[@-~]|\\][^\x07\x1b]*(?:\x07|\x1b\\\\)|[ -/]*[0-~])")
"""One escape sequence: CSI, OSC or a plain one (ECMA-48)."""


def printable(text: str) -> str:
    r"""`text` with whatever a terminal would obey written out: an escape character becomes the four letters `\x1b`."""

    def written_out(found: re.Match[str]) -> str:
        code = ord(found.group())
        return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"

    return OBEYED.sub(written_out, text)


def one_line(text: str) -> str:
    """`text` printable and in one line."""
    return printable(" ".join(text.splitlines()))


def log_text(text: str) -> str:
    """Output of a program without colours and cursor movements; what it redrew (a progress bar) is one line each."""
    return printable(SEQUENCE.sub("", text).replace("\r\n", "\n").replace("\r", "\n"))


def not_utf8(error: UnicodeDecodeError) -> str:
    """Why a file is no UTF-8 text, for people."""
    if error.object[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "it is UTF-16 text, expected UTF-8: save it as UTF-8"
    return f"byte {error.start + 1} is not UTF-8, expected UTF-8 text"


def lines_of(text: str) -> list[str]:
    """The lines of `text`, which end with LF or CRLF: str.splitlines also cuts at U+2028 and U+0085, inside strings."""
    return [line[:-1] if line.endswith("\r") else line for line in text.split("\n")]


def json_line(document: Any) -> bytes:
    """`document` as one line of a JSONL file: readable UTF-8, or ASCII where a string has no UTF-8 (a lone surrogate,
    from a file name in another encoding or from somebody's JSON)."""
    try:
        return (json.dumps(document, ensure_ascii=False, default=str) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(document, default=str) + "\n").encode()


def parse_json(document: bytes | str) -> Any:
    """The JSON of `document`, its strings and keys printable.

    Raises ValueError for what is not JSON, is not UTF-8 or is nested deeper than MAX_DEPTH.
    """
    return cleaned(load_json(document))


def load_json(document: bytes | str) -> Any:
    """As `json.loads`, of bytes with or without a byte order mark, and ValueError also for what is nested too deeply.

    For text that is cleaned later.
    """
    try:
        return json.loads(document if isinstance(document, str) else document.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse_object(document: bytes | str) -> dict[str, Any]:
    """As `parse_json`, of what has to be an object."""
    found = parse_json(document)
    if not isinstance(found, dict):
        raise ValueError(f"expected an object, found {type(found).__name__}")
    return found


def cleaned(value: Any, depth: int = 0) -> Any:
    """A value made of JSON's types with all its text printable. ValueError for what is nested too deeply, and for a
    whole number that no float can hold: arithmetic on it would raise OverflowError somewhere else."""
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    if isinstance(value, str):
        return printable(value) if OBEYED.search(value) else value
    if isinstance(value, dict):
        for key, item in value.items():
            if _too_large(item):
                raise ValueError(f"{one_line(str(key))} is a number of over 300 digits")
        return {cleaned(key, depth): cleaned(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [cleaned(item, depth + 1) for item in value]
    if _too_large(value):
        raise ValueError("a number of over 300 digits")
    return value


def _too_large(value: Any) -> bool:
    return isinstance(value, int) and not -LARGEST <= value <= LARGEST


def json_kind(value: Any) -> str:
    """What a JSON value is, for people: "a number", "an object"."""
    if value is None:
        return "null"
    if isinstance(value, (int, float)) and not abs(value) <= LARGEST:
        return "no finite number"
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return kinds.get(type(value), type(value).__name__)


def is_kind(value: Any, kind: str) -> bool:
    """Whether a JSON value is "text", "a number", "a whole number", "a time" (Unix seconds), "a list", "an object"."""
    if kind == "a whole number":
        return isinstance(value, int) and json_kind(value) == "a number"
    if kind == "a time":
        return json_kind(value) == "a number" and 0 <= value < LAST_TIME
    return json_kind(value) == kind


def of_kinds(document: dict[str, Any], kinds: dict[str, str]) -> tuple[dict[str, Any], list[str]]:
    """`document` without the fields that are of another kind than `kinds` asks for, and what is wrong with each.

    Fields that `kinds` does not name, and null, are left alone.
    """
    wrong = {
        name: f"{name} is {json_kind(document[name])}, expected {kind}"
        for name, kind in kinds.items()
        if document.get(name) is not None and not is_kind(document[name], kind)
    }
    return {name: value for name, value in document.items() if name not in wrong}, list(wrong.values())
