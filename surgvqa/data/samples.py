"""The samples of a JSONL file. Uses neither numpy nor torch.

One line is one sample: `id`, `video_id`, `frames` (names `<video_id>_<frame number>`), `question`, `question_type`,
`answer` (a sentence), `short_answer` (the label). Further fields are ignored. Missing data is never replaced: an
invalid line raises a UsageError that names it.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from surgvqa.data.jsonl import BadLine, Problem, read_objects, text_field
from surgvqa.errors import UsageError
from surgvqa.untrusted import json_kind

TEXT_FIELDS = ("id", "video_id", "question", "question_type", "answer", "short_answer")
NAME_FIELDS = ("id", "video_id", "question_type")
"""Fields that are used in file paths."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One line of a JSONL file."""

    id: str
    """Not unique: in the real dataset, hundreds of ids have several questions."""
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
        """The video and the frames that the sample shows."""
        return self.video_id, self.frames

    @property
    def label(self) -> str:
        """The short answer for comparison: without case and outer spaces."""
        return self.short_answer.strip().lower()

    @property
    def wording(self) -> str:
        """The question for comparison: without case and extra spaces."""
        return wording_of(self.question)

    @property
    def frame_numbers(self) -> list[int] | None:
        """The numbers in the frames' names; None if one has no number."""
        numbers = [frame.rpartition("_")[2] for frame in self.frames]
        return [int(n) for n in numbers] if all(n.isdecimal() and len(n) < 19 for n in numbers) else None

    @property
    def place(self) -> str:
        """`file:line`, for messages."""
        return f"{self.file}:{self.line}" if self.file else self.id


def wording_of(question: str) -> str:
    """A question for comparison: without case and extra spaces."""
    return " ".join(question.split()).casefold()


# --- reading ----------------------------------------------------------------------------------------------------------


def read_samples(path: str | os.PathLike[str]) -> list[Sample]:
    """All samples of a JSONL file, in order.

    Raises UsageError with the first bad line and the number of further ones, or when the file is empty.
    """
    samples, problems = scan_samples(path)
    if problems:
        rest = len(problems) - 1
        more = f" (and {rest} more bad line{'s' * (rest > 1)}; surgvqa check-data lists them)" if rest else ""
        raise UsageError(f"{problems[0]}{more}")
    return samples


def scan_samples(path: str | os.PathLike[str]) -> tuple[list[Sample], list[Problem]]:
    """(samples, problems of the bad lines). Raises UsageError when the file is unreadable or empty."""
    file = os.fspath(path)
    samples, problems = [], []
    for number, record in read_objects(path, "a JSONL file of samples"):
        try:
            samples.append(_sample(record, number, file))
        except BadLine as bad:
            problems.append(Problem(file, number, str(bad)))
    return samples, problems


def _sample(record: dict[str, Any] | BadLine, number: int, file: str) -> Sample:
    if isinstance(record, BadLine):
        raise record
    texts = {field: text_field(record, field) for field in TEXT_FIELDS}
    for field in NAME_FIELDS:
        if not _is_file_name(texts[field]):
            raise BadLine(f"{field} is {shortened(texts[field])}, expected text that can be part of a file name")
    return Sample(frames=_frames(record, texts["video_id"]), line=number, file=file, **texts)


def _frames(record: dict[str, Any], video_id: str) -> tuple[str, ...]:
    expected = f"a list of names {video_id}_<frame number>"
    if "frames" not in record:
        raise BadLine(f"frames is missing, expected {expected}")
    frames = record["frames"]
    if not isinstance(frames, list):
        raise BadLine(f"frames is {json_kind(frames)}, expected {expected}")
    if not frames:
        raise BadLine(f"frames is an empty list, expected {expected}")
    prefix = f"{video_id}_"
    for index, frame in enumerate(frames):
        if not isinstance(frame, str):
            raise BadLine(f"frames[{index}] is {json_kind(frame)}, expected a name {video_id}_<frame number>")
        if not (frame.startswith(prefix) and frame[len(prefix) :].isalnum()):
            raise BadLine(f"frames[{index}] is {shortened(frame)}, expected {video_id}_<frame number>")
    return tuple(frames)


def _is_file_name(text: str) -> bool:
    return text.isprintable() and not set(text) & set("/\\") and text not in (".", "..")


def shortened(text: str) -> str:
    """`text` quoted, escaped (half surrogates too) and cut for a one-line message."""
    return ascii(text if len(text) <= 60 else text[:60] + "...") if not text.isprintable() else repr(text[:60])


# --- what a blind guess scores ----------------------------------------------------------------------------------


def majority_labels(samples: Iterable[Sample]) -> dict[str, tuple[str, int]]:
    """{question type: (its most frequent label, count)}; of equally frequent labels the alphabetically first."""
    by_type: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in samples:
        by_type[sample.question_type][sample.label] += 1
    return {kind: min(labels.items(), key=lambda item: (-item[1], item[0])) for kind, labels in by_type.items()}


def majority_accuracy(samples: Sequence[Sample]) -> float:
    """Share (0..1) of the samples whose label is the most frequent one of their question type; 0 without samples.

    The score of a model that only knows the labels' frequencies and neither looks nor listens.
    """
    return sum(count for _, count in majority_labels(samples).values()) / len(samples) if samples else 0.0
