"""Known answers: those of this run so far, of the run that it resumes, and of earlier runs of the workspace.

    <run>/predictions.partial.jsonl    the run's answers so far; deleted when predictions.jsonl is complete
    <workspace>/cache/answers/<context>.jsonl    all answers of one model with the same settings

An answer's key is the hash of everything that it depends on: the contents of checkpoint, adapter, frames and recording,
the settings, the versions of the libraries, and the GPU. Each line is one write(2) to an O_APPEND file, so kill -9
leaves complete lines and at most one truncated line, which is skipped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from surgvqa.data.frames import select_frames
from surgvqa.data.lookup import AudioIndex, FrameIndex
from surgvqa.data.samples import Sample
from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.provenance.hashes import Hashes
from surgvqa.untrusted import is_kind, json_line, load_json

PARTIAL = "predictions.partial.jsonl"

Answer = tuple[str, float]
"""(answer, milliseconds that it took)."""


def context_key(settings: Mapping[str, Any]) -> str:
    """The hash of the model and all other settings that are the same for all samples of a run."""
    return _digest(settings)


def sample_keys(
    samples: Sequence[Sample],
    frames_dir: str,
    audio_dir: str,
    hashes: Hashes,
    context: str,
    *,
    num_frames: int,
    input_mode: str,
) -> list[str]:
    """The key of each sample's answer, from the parts that the model gets in this input mode."""
    frames = FrameIndex(frames_dir)
    shown = [[str(frames.find(frame)) for frame in select_frames(sample.frames, num_frames)] for sample in samples]
    heard: list[str | None] = [None] * len(samples)
    if input_mode != "text_only":
        audio = AudioIndex(audio_dir, samples)
        heard = [str(audio.find(sample)) for sample in samples]
    questions = [sample.question if input_mode != "audio_only" else None for sample in samples]
    return answer_keys(context, shown, heard, questions, hashes)


def answer_keys(
    context: str,
    shown: Sequence[Sequence[str]],
    heard: Sequence[str | None],
    questions: Sequence[str | None],
    hashes: Hashes,
) -> list[str]:
    """The keys of answers to these frames, recordings and written questions; None if the model gets none."""
    try:
        content = hashes.of_files([*(path for paths in shown for path in paths), *filter(None, heard)])
    except OSError as error:
        raise UsageError(f"{error.filename}: {error.strerror}, expected a readable file") from None
    return [
        _digest(
            {
                "context": context,
                "frames": [content[path] for path in paths],
                "audio": content[sound] if sound else None,
                "question": question,
            }
        )
        for paths, sound, question in zip(shown, heard, questions)
    ]


def _digest(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True, default=str).encode()).hexdigest()[:32]


class Lines:
    """A JSONL file to which complete lines are appended."""

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(file, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            size = os.fstat(self._fd).st_size
            if size and os.pread(self._fd, 1, size - 1) != b"\n":  # truncated when its writer was killed
                os.write(self._fd, b"\n")
        except OSError as error:
            raise SurgvqaError(f"{file}: cannot be written: {error.strerror}") from None

    def add(self, document: Mapping[str, Any]) -> None:
        """Appends one line. Raises SurgvqaError when the disk is full, so that no answer is silently lost."""
        line = json_line(document)
        try:
            if os.write(self._fd, line) < len(line):
                raise OSError(28, "No space left on device")
        except OSError as error:
            raise SurgvqaError(f"{self.file}: cannot be written: {error.strerror}") from None

    def close(self) -> None:
        """Syncs the file to the disk and closes it."""
        try:
            os.fsync(self._fd)
        finally:
            os.close(self._fd)


def read_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Yields the complete lines with a key and an answer; none if there is no file."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}, so its answers cannot be read") from None
    for line in content.split(b"\n"):
        try:
            record = load_json(line)
        except ValueError:
            continue
        kinds = {"key": "text", "predicted_answer": "text", "inference_time_ms": "a number"}
        if isinstance(record, dict) and all(is_kind(record.get(name), kind) for name, kind in kinds.items()):
            yield record


class KnownAnswers:
    """The answers to the samples of one run: `known` {key: answer}. New answers are written to the disk at once."""

    def __init__(self, samples: Sequence[Sample], keys: Sequence[str], run_folder: Path, cache: Path | None) -> None:
        self.samples, self.keys = samples, keys
        self.known: dict[str, Answer] = {}
        self._wanted = set(keys)
        if cache is not None:
            self._add_wanted(read_lines(cache))
        self._partial = Lines(run_folder / PARTIAL)
        self._cache = Lines(cache) if cache is not None else None
        self._cached = set(self.known)

    def _add_wanted(self, records: Iterator[dict[str, Any]]) -> None:
        for record in records:
            if record["key"] in self._wanted:
                self.known[record["key"]] = record["predicted_answer"], float(record["inference_time_ms"])

    def resume_from(self, folder: Path) -> int:
        """Reuses the answers of the run that this one resumes, if model and settings are the same.

        Returns how many are reused. Raises UsageError if the run had other samples.
        """
        records = list(read_lines(folder / PARTIAL))
        for record in records:
            index = record.get("sample")
            known = isinstance(index, int) and 0 <= index < len(self.samples)
            if not known or any(record.get(k) != v for k, v in _sample_fields(self.samples[int(index or 0)]).items()):
                raise UsageError(
                    f"resume: {folder.name} answered sample {index} ({str(record.get('question_id'))[:40]}), which"
                    " differs from the given samples; has the file changed? start again without --resume"
                )
        self._add_wanted(iter(records))
        return sum(record["key"] in self._wanted for record in records)

    def unanswered(self) -> list[int]:
        """The indices of samples without an answer, in order. Known answers are written to this run's file."""
        missing = []
        for index, key in enumerate(self.keys):
            if key in self.known:
                self._write(index)
            else:
                missing.append(index)
        return missing

    def add(self, index: int, text: str, milliseconds: float) -> None:
        """Adds the answer to sample `index`."""
        self.known[self.keys[index]] = text, milliseconds
        self._write(index)

    def _write(self, index: int) -> None:
        key = self.keys[index]
        text, milliseconds = self.known[key]
        record = {"key": key, "predicted_answer": text, "inference_time_ms": milliseconds}
        self._partial.add({"sample": index, **_sample_fields(self.samples[index]), **record})
        if self._cache and key not in self._cached:
            self._cache.add(record)
            self._cached.add(key)

    def answers(self) -> list[Answer]:
        """The answer to each sample, all of which must be known."""
        return [self.known[key] for key in self.keys]

    def close(self) -> None:
        """Syncs the files to the disk and closes them."""
        self._partial.close()
        if self._cache:
            self._cache.close()


def _sample_fields(sample: Sample) -> dict[str, str]:
    return {"question_id": sample.id, "video_id": sample.video_id, "question": sample.question}
