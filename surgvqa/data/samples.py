"""The samples of a JSONL file, and where their frames and spoken questions lie. No numpy, no torch.

One line is one sample: `id`, `video_id`, `frames` (names `<video_id>_<frame number>`), `question`, `question_type`,
`answer` (a sentence), `short_answer` (the label); further fields are ignored. Nothing is ever put in the place of what
is missing: a line that is not a sample, a frame or a question that is not there is a UsageError that names it.
"""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgvqa.errors import UsageError

TEXT_FIELDS = ("id", "video_id", "question", "question_type", "answer", "short_answer")
NAME_FIELDS = ("id", "video_id", "question_type")
"""Fields that become part of a file's path."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One line of a JSONL file."""

    id: str
    """Not unique: in the real set hundreds of ids stand for several questions."""
    video_id: str
    frames: tuple[str, ...]
    question: str
    question_type: str
    answer: str
    short_answer: str
    line: int = 0
    file: str = ""

    @property
    def clip(self) -> tuple[str, tuple[str, ...]]:
        """What is seen: the video and its frames."""
        return self.video_id, self.frames

    @property
    def label(self) -> str:
        """The short answer as labels are compared: without case and outer spaces."""
        return self.short_answer.strip().lower()

    @property
    def wording(self) -> str:
        """The question as questions are compared: without case and extra spaces."""
        return " ".join(self.question.split()).casefold()

    @property
    def place(self) -> str:
        """`file:line`, for messages."""
        return f"{self.file}:{self.line}" if self.file else self.id


@dataclass(frozen=True, slots=True)
class Problem:
    """A line that is not a sample, and why."""

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}"


# --- reading ----------------------------------------------------------------------------------------------------------


def read_samples(path: str | os.PathLike[str]) -> list[Sample]:
    """All samples of a JSONL file, in order.

    Raises UsageError with the first bad line and the number of further ones, or when there is no line at all.
    """
    samples, problems = scan_samples(path)
    if problems:
        rest = len(problems) - 1
        more = f" (and {rest} more bad line{'s' * (rest > 1)}; surgvqa check-data lists them)" if rest else ""
        raise UsageError(f"{problems[0]}{more}")
    return samples


def scan_samples(path: str | os.PathLike[str]) -> tuple[list[Sample], list[Problem]]:
    """The good lines as samples, the bad ones as problems. Raises UsageError when the file is unreadable or empty.

    A byte order mark, CRLF and blank lines at the end are tolerated.
    """
    file = os.fspath(path)
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror or error}, expected a JSONL file of samples") from None
    except ValueError as error:  # a NUL byte in the path
        raise UsageError(f"{file!r}: {error}, expected a JSONL file of samples") from None
    lines = content.removeprefix(b"\xef\xbb\xbf").rstrip().split(b"\n")
    if lines == [b""]:
        raise UsageError(f"{file}: empty, expected one JSON object a line")
    samples, problems = [], []
    for number, line in enumerate(lines, 1):
        try:
            samples.append(_parse(line, number, file))
        except _Bad as bad:
            problems.append(Problem(file, number, str(bad)))
    return samples, problems


class _Bad(Exception):
    """Why a line is no sample."""


def _parse(line: bytes, number: int, file: str) -> Sample:
    if not line.strip():
        raise _Bad("the line is blank, expected a JSON object")
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _Bad(f"byte {error.start + 1} is not UTF-8, expected UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise _Bad(f"not JSON: {error.msg} at column {error.colno}, expected one JSON object a line") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets thousands deep
        raise _Bad(f"not JSON that can be read: {error}") from None
    if not isinstance(record, dict):
        raise _Bad(f"the line is {_kind(record)}, expected a JSON object")
    for field in TEXT_FIELDS:
        _text(record, field)
    for field in NAME_FIELDS:
        if not _is_file_name(record[field]):
            raise _Bad(f"{field} is {shortened(record[field])}, expected text that can be part of a file name")
    video_id = record["video_id"]
    return Sample(frames=_frames(record, video_id), line=number, file=file, **{f: record[f] for f in TEXT_FIELDS})


def _text(record: dict[str, Any], field: str) -> None:
    if field not in record:
        raise _Bad(f"{field} is missing, expected text")
    value = record[field]
    if not isinstance(value, str):
        raise _Bad(f"{field} is {_kind(value)}, expected text")
    if not value.strip():
        raise _Bad(f"{field} is empty, expected text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _Bad(f"{field} holds half of a surrogate pair, expected text") from None


def _frames(record: dict[str, Any], video_id: str) -> tuple[str, ...]:
    expected = f"a list of names {video_id}_<frame number>"
    if "frames" not in record:
        raise _Bad(f"frames is missing, expected {expected}")
    frames = record["frames"]
    if not isinstance(frames, list):
        raise _Bad(f"frames is {_kind(frames)}, expected {expected}")
    if not frames:
        raise _Bad(f"frames is an empty list, expected {expected}")
    for index, frame in enumerate(frames):
        if not isinstance(frame, str):
            raise _Bad(f"frames[{index}] is {_kind(frame)}, expected a name {video_id}_<frame number>")
        if not frame.removeprefix(f"{video_id}_").isalnum() or not frame.startswith(f"{video_id}_"):
            raise _Bad(f"frames[{index}] is {shortened(frame)}, expected {video_id}_<frame number>")
    return tuple(frames)


def _is_file_name(text: str) -> bool:
    return text.isprintable() and not set(text) & set("/\\") and text not in (".", "..")


def _kind(value: Any) -> str:
    """What a JSON value is, in words."""
    kinds = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}
    return kinds.get(type(value), "an object")


def shortened(text: str) -> str:
    """`text` quoted, escaped (half surrogates too) and cut for a one-line message."""
    return ascii(text if len(text) <= 60 else text[:60] + "...") if not text.isprintable() else repr(text[:60])


# --- what can be had without looking ----------------------------------------------------------------------------------


def majority_labels(samples: Iterable[Sample]) -> dict[str, tuple[str, int]]:
    """{question type: (its most frequent label, how often)}; of equally frequent labels the alphabetically first."""
    by_type: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in samples:
        by_type[sample.question_type][sample.label] += 1
    return {kind: min(labels.items(), key=lambda item: (-item[1], item[0])) for kind, labels in by_type.items()}


def majority_accuracy(samples: Sequence[Sample]) -> float:
    """Share (0..1) of the samples whose label is the most frequent one of their question type; 0 without samples.

    What a model reaches that has learned the labels' frequencies and neither looks nor listens.
    """
    return sum(count for _, count in majority_labels(samples).values()) / len(samples) if samples else 0.0
