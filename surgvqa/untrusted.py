"""Makes text and JSON from outside (a host, a log, somebody's files) safe to read and to show.

Standard library and Python 3.8 only, because the agent uses this module on GPU hosts.
"""

from __future__ import annotations

import json
import re
from typing import Any

MAX_DEPTH = 50
"""Largest accepted depth of nested lists and objects. Our own documents stay well below it."""
LARGEST = 1e300
"""Largest accepted absolute value of a number. Beyond it, arithmetic could overflow."""
LAST_TIME = 253402300800.0
"""The year 10000 in Unix seconds. Python has no date for later times."""
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
"""Characters that a terminal obeys instead of showing: control characters except newline and tab, and changes of text
direction. Also lone surrogates, which cannot be encoded."""
SEQUENCE = re.compile("\x1b(?:\\[[0-9:;<=>?]*[ -/]*[@-~]|\\][^\x07\x1b]*(?:\x07|\x1b\\\\)|[ -/]*[0-~])")
"""One escape sequence: CSI, OSC or a simple one (ECMA-48)."""


def printable(text: str) -> str:
    r"""`text` with each character in OBEYED written as an escape: ESC becomes the four characters `\x1b`."""

    def written_out(found: re.Match[str]) -> str:
        code = ord(found.group())
        return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"

    return OBEYED.sub(written_out, text)


def one_line(text: str) -> str:
    """`text` in one line and printable."""
    return printable(" ".join(text.splitlines()))


def log_text(text: str) -> str:
    """A program's output without colours and cursor movements. Each state of a progress bar becomes a line."""
    return printable(SEQUENCE.sub("", text).replace("\r\n", "\n").replace("\r", "\n"))


def not_utf8(error: UnicodeDecodeError) -> str:
    """Says in words why a file is not UTF-8 text."""
    if error.object[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "it is UTF-16 text, expected UTF-8: save it as UTF-8"
    return f"byte {error.start + 1} is not UTF-8, expected UTF-8 text"


def lines_of(text: str) -> list[str]:
    """The lines of `text`, split at LF or CRLF only. str.splitlines also splits at U+2028 and U+0085."""
    return [line[:-1] if line.endswith("\r") else line for line in text.split("\n")]


def json_line(document: Any) -> bytes:
    """`document` as one line of a JSONL file, in readable UTF-8.

    The line is ASCII if a string cannot be encoded as UTF-8, because it contains a lone surrogate (from a file name in
    another encoding or from somebody's JSON).
    """
    try:
        return (json.dumps(document, ensure_ascii=False, default=str) + "\n").encode()
    except UnicodeEncodeError:
        return (json.dumps(document, default=str) + "\n").encode()


def parse_json(document: bytes | str) -> Any:
    """The JSON value in `document`, with printable strings and keys.

    Raises ValueError if `document` is not JSON, is not UTF-8, is nested deeper than MAX_DEPTH or has an integer
    beyond LARGEST.
    """
    return cleaned(load_json(document))


def load_json(document: bytes | str) -> Any:
    """Like `json.loads`, but accepts bytes with a byte order mark and raises ValueError if nested too deeply.

    The strings are not printable yet: the caller passes the value to `cleaned`.
    """
    try:
        return json.loads(document if isinstance(document, str) else document.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse_object(document: bytes | str) -> dict[str, Any]:
    """Like `parse_json`, and raises ValueError if the value is not an object."""
    found = parse_json(document)
    if not isinstance(found, dict):
        raise ValueError(f"expected an object, found {type(found).__name__}")
    return found


def cleaned(value: Any, depth: int = 0) -> Any:
    """A JSON value with all its text made printable.

    Raises ValueError if it is nested too deeply, or has an integer too large for a float, with which arithmetic would
    raise OverflowError elsewhere.
    """
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
    """Names the kind of a JSON value for a message: "a number", "an object"."""
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
    """`document` without the fields whose kind differs from that in `kinds`, and a message about each of those.

    Fields that `kinds` does not name, and null, stay.
    """
    wrong = {
        name: f"{name} is {json_kind(document[name])}, expected {kind}"
        for name, kind in kinds.items()
        if document.get(name) is not None and not is_kind(document[name], kind)
    }
    return {name: value for name, value in document.items() if name not in wrong}, list(wrong.values())
