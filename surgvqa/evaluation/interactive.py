"""`surgvqa ask --interactive`: answers one question after another while the model stays loaded.

On a terminal, a person chooses among the samples of a file. Otherwise a program sends a JSON object per line on stdin,

    {"frames": [path, …], "audio": path, "question": text, "labels": {label: answer}}

of which only `frames` is required. Each line on stdout is an object: {"ready": true, …} when the model is loaded, then
for each request the result of evaluation/asker.py or {"error": text}. The end of stdin ends the process.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from surgvqa.config.options import AskOptions
from surgvqa.data.lookup import AudioIndex, FrameIndex
from surgvqa.data.samples import Sample, read_samples
from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.outcome import Outcome
from surgvqa.untrusted import is_kind, one_line, parse_object

if TYPE_CHECKING:
    from surgvqa.evaluation.asker import Asker

KINDS = {"frames": "a list", "audio": "text", "question": "text", "labels": "an object"}
HELP = "number or id: that sample; Enter: the next one; audio FILE or say TEXT: ask about the same clip; q: end"


def run(options: AskOptions) -> Outcome:
    """Answers until the end of stdin, or q."""
    from surgvqa.evaluation.asker import Asker

    on_terminal = sys.stdin.isatty()
    if on_terminal and not (options.eval_data_path and options.frames_dir):
        raise UsageError("--interactive chooses among samples: give --eval_data_path, --frames_dir, --audio_dir")
    asker = Asker(options)
    if on_terminal:
        return Outcome({"asked": talk(asker, options, input, print)})
    return Outcome({"asked": serve(asker, sys.stdin, sys.stdout)})


def labels_of(samples: Sequence[Sample], kind: str) -> dict[str, str]:
    """{label: an answer that states it} of a question type, sorted by label."""
    found: dict[str, str] = {}
    for sample in samples:
        if sample.question_type == kind:
            found.setdefault(sample.label, sample.answer)
    return dict(sorted(found.items()))


def serve(asker: Asker, requests: TextIO, replies: TextIO) -> int:
    """Answers a program's requests, line by line. Returns the number of questions."""

    def reply(document: dict[str, Any]) -> None:
        print(json.dumps(document), file=replies, flush=True)

    reply({"ready": True, "model": asker.answerer.description, "load_seconds": asker.load_seconds})
    asked = 0
    for line in requests:
        try:
            reply(asker.ask(**_request(line)))
            asked += 1
        except SurgvqaError as error:
            reply({"error": one_line(str(error))})
    return asked


def _request(line: str) -> dict[str, Any]:
    try:
        document = parse_object(line)
    except ValueError as error:
        raise UsageError(f"a request is {error}, expected a JSON object in one line") from None
    for name, kind in KINDS.items():
        if not is_kind(document.get(name), kind) and (document.get(name) is not None or name == "frames"):
            raise UsageError(f"a request's {name}: expected {kind}")
    return {"audio": None, "question": None, **{name: document[name] for name in KINDS if name in document}}


def talk(asker: Asker, options: AskOptions, read: Callable[[str], str], write: Callable[[str], None]) -> int:
    """Answers a person. Returns the number of questions. Raises UsageError for unreadable samples or folders."""
    samples = read_samples(str(options.eval_data_path))
    frames = FrameIndex(str(options.frames_dir))
    spoken = options.input_mode != "text_only"
    audio = AudioIndex(str(options.eval_audio_dir or options.audio_dir), samples) if spoken else None
    write(f"{len(samples)} samples. {HELP}")
    at, asked = -1, 0
    while True:
        try:
            line = read("> ").strip()
        except EOFError:
            return asked
        if line in ("q", "quit", "exit"):
            return asked
        word, _, rest = line.partition(" ")
        own_words = word in ("audio", "say") and bool(rest) and at >= 0
        if not own_words:
            found = _find(samples, line, at)
            if found is None:
                write(f"{one_line(line)}: no such sample. {HELP}")
                continue
            at = found
        sample = samples[at]
        try:
            heard = str(audio.find(sample)) if audio else None
            asked_aloud, asked_in_writing = rest if word == "audio" and own_words else heard, sample.question
            if word == "say" and own_words:
                asked_in_writing = rest
            place = f"{at + 1}  {sample.id}  {sample.question_type}"
            write(f"{place}: {one_line(asked_in_writing)}  ({one_line(Path(asked_aloud or '').name)})")
            labels = labels_of(samples, sample.question_type)
            paths = [str(frames.find(frame)) for frame in sample.frames]
            found_answer = asker.ask(paths, asked_aloud, asked_in_writing, labels)
        except SurgvqaError as error:
            write(one_line(str(error)))
            continue
        asked += 1
        write(f"   {one_line(found_answer['answer'])}   ({found_answer['seconds']:.2f} s; the label is {sample.label})")
        for label, probability in sorted(found_answer["probabilities"].items(), key=lambda item: -item[1]):
            write(f"   {100 * probability:5.1f} %  {one_line(label)}")


def _find(samples: Sequence[Sample], line: str, at: int) -> int | None:
    if not line:
        return (at + 1) % len(samples)
    if line.isdecimal() and 0 < int(line) <= len(samples):
        return int(line) - 1
    return next((index for index, sample in enumerate(samples) if sample.id == line), None)
