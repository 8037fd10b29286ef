"""`surgvqa speak`: speaks each sample's question in one of several wordings, voices, speeds and noise levels.

`<output>/<name>.jsonl` has the samples with their new wording, `<output>/<name>/` their recordings, and
`<name>_held_out` the same samples in the held-out wordings and voices. How a sample is spoken depends on the seed and
the name of its recording, `<video_id>_<id>_<question_type>.mp3` (one id may have several questions), but not on the
order of the lines or on other lines. Equal recordings are synthesised once, and the samples' files are links to them.

Files are written atomically, and the folder records the settings. The same command continues an interrupted one; a
command with other settings is refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import math
import os
import random
import shutil
import threading
import time
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich import box
from rich.console import Console
from rich.table import Table

from surgvqa.config.preparing import SpeakOptions
from surgvqa.config.workspace import Workspace
from surgvqa.data.audio_container import missing_part
from surgvqa.data.deep import WINDOW_S
from surgvqa.data.jsonl import read_objects
from surgvqa.data.lookup import SPOKEN, composite_name
from surgvqa.data.noise import with_noise
from surgvqa.data.samples import Sample, read_samples, shortened
from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.files import read_json, write_json_atomic, write_synced
from surgvqa.machine.packages import require_installed
from surgvqa.outcome import Outcome
from surgvqa.prepare.edge import Edge
from surgvqa.prepare.espeak import Espeak
from surgvqa.prepare.wordings import Wordings, pronounceable, read_wordings
from surgvqa.terminal.drawing import plain
from surgvqa.terminal.figures import counted, human_seconds
from surgvqa.terminal.progress import in_threads
from surgvqa.untrusted import json_line, one_line

if TYPE_CHECKING:
    import numpy as np

LONGEST_NAME = 255
"""Limit for a file name in bytes."""


class Engine(Protocol):
    """What speaks."""

    known: tuple[str, ...]
    held_out: tuple[str, ...]

    def refuse_unknown(self, voices: Sequence[str]) -> None:
        """Raises UsageError for an unavailable voice."""

    def say(self, text: str, voice: str, speed: float) -> tuple[np.ndarray, int]:
        """(float32 [samples] in -1..1, sample rate in Hz); `speed` 1 is the voice's usual speed."""


@dataclass(frozen=True)
class Recording:
    """How a question is spoken. Equal values share one recording."""

    text: str
    voice: str
    speed: float
    noise_db: float | None
    """Signal-to-noise ratio in dB; None means no noise."""


@dataclass
class Spoken:
    """One of the two output files: each sample with its recording."""

    file: Path
    folder: Path
    samples: list[Sample]
    recordings: list[Recording]

    def path(self, sample: Sample) -> Path:
        return self.folder / f"{composite_name(sample)}.mp3"


def check(options: SpeakOptions) -> None:
    """Raises UsageError for empty lists or repeated values, SurgvqaError when the engine is not installed."""
    _decibels(options.noise_db)
    for name in ("speeds", "noise_db", "voices", "held_out_voices"):
        values = getattr(options, name)
        if values is not None and not values:
            raise UsageError(f"{name} is empty, expected one value or more")
        if values and len(set(values)) < len(values):
            raise UsageError(f"{name}: a value is given twice, expected different ones")
    if options.voices and None in options.voices:
        raise UsageError("voices: none, expected one voice or more")
    if options.engine == "edge":
        require_installed("--engine edge", ("edge_tts", "numpy", "soundfile"), "edge-tts")
    else:
        require_installed("speak", ("espeakng_loader", "numpy", "soundfile"), "speak")


def run(options: SpeakOptions, workspace: Workspace) -> Outcome:
    """Plans everything, speaks the missing recordings, then writes the files of samples."""
    began = time.monotonic()
    engine: Engine = Edge() if options.engine == "edge" else Espeak()
    known = list(options.voices or engine.known)
    held_out = (
        [v for v in options.held_out_voices if v] if options.held_out_voices else _without(engine.held_out, known)
    )
    if both := sorted(set(known) & set(held_out)):
        raise UsageError(f"{both[0]} is in voices and in held_out_voices, expected one of them")
    samples = read_samples(options.file)
    wordings = read_wordings(options.wordings, samples) if options.wordings else Wordings()
    engine.refuse_unknown(known + held_out)

    output, name = Path(options.output), Path(options.file).stem
    plan = [_plan(output, name, samples, wordings.known, known, options)]
    if wordings.held_out or held_out:
        plan.append(
            _plan(output, f"{name}_held_out", samples, wordings.held_out or wordings.known, held_out or known, options)
        )
    settings = _settings(options, known, held_out)
    with contextlib.ExitStack() as locks:
        _prepare_folders(plan, settings, options)
        for spoken in plan:
            locks.enter_context(_locked(spoken.folder))
            for left in spoken.folder.glob(".*.tmp"):  # left by a killed process
                left.unlink()
        new = _speak(engine, plan)
        for spoken in plan:
            _write_samples(options.file, spoken)
    data = {
        "output": str(options.output),
        "samples": len(samples),
        "engine": options.engine,
        "speak_seed": options.speak_seed,
        "files": [_summary(spoken) for spoken in plan],
        "recordings_made": new,
        "seconds": round(time.monotonic() - began, 2),
        "warnings": _warnings(plan, bool(wordings.held_out), bool(held_out)),
    }
    return Outcome(data, show=lambda console: _show(console, data))


# --- planning ---------------------------------------------------------------------------------------------------------


def _decibels(texts: Sequence[str]) -> list[float | None]:
    """Signal-to-noise ratios in dB; None for "none". Raises UsageError for other text."""
    found: list[float | None] = []
    for text in texts:
        try:
            found.append(None if text == "none" else float(text))
        except ValueError:
            found.append(math.nan)
        if found[-1] is not None and not abs(found[-1]) <= 100:
            raise UsageError(f"noise_db: {text!r}, expected none, or by how many dB speech is louder (-100 to 100)")
    return found


def _without(voices: Sequence[str], others: Sequence[str]) -> list[str]:
    return [voice for voice in voices if voice not in others]


def _plan(
    output: Path,
    name: str,
    samples: Sequence[Sample],
    wordings: dict[str, list[str]],
    voices: Sequence[str],
    options: SpeakOptions,
) -> Spoken:
    """Decides how each sample is spoken. Raises UsageError if recordings of two questions would have the same name."""
    noise = _decibels(options.noise_db)
    first: dict[str, tuple[Sample, str, Recording]] = {}
    recordings = []
    for sample in samples:
        text = pronounceable(sample.question)
        if text is None:
            raise UsageError(f"{sample.place}: question is {shortened(sample.question)}, expected pronounceable words")
        stem = composite_name(sample)
        draw = random.Random(os.fsencode(f"{options.speak_seed} {name} {stem}"))
        if wordings:
            text = draw.choice(wordings[sample.question_type])
        recording = Recording(text, draw.choice(voices), draw.choice(options.speeds), draw.choice(noise))
        # A file system may ignore case, or treat two encodings of an accent as equal.
        other, its, earlier = first.setdefault(unicodedata.normalize("NFC", stem).casefold(), (sample, stem, recording))
        if (its, earlier) != (stem, recording):
            raise UsageError(
                f"{sample.place}: the recording would be named {shortened(stem)}.mp3 like that of {other.place}, "
                "which is another question (the name consists of video_id, id and question_type); change one of the ids"
            )
        if len(os.fsencode(f"{stem}.mp3")) > LONGEST_NAME:
            raise UsageError(
                f"{sample.place}: video_id, id and question_type give a file name of over {LONGEST_NAME} bytes"
            )
        recordings.append(recording)
    return Spoken(output / f"{name}.jsonl", output / name, list(samples), recordings)


def _settings(options: SpeakOptions, known: Sequence[str], held_out: Sequence[str]) -> dict[str, Any]:
    """The settings that determine how every sample is spoken."""

    def digest(path: str | None) -> str | None:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else None

    return {
        "engine": options.engine,
        "voices": list(known),
        "held_out_voices": list(held_out),
        "speeds": list(options.speeds),
        "noise_db": list(options.noise_db),
        "speak_seed": options.speak_seed,
        "samples_sha256": digest(options.file),
        "wordings_sha256": digest(options.wordings),
    }


# --- folders ----------------------------------------------------------------------------------------------------------


def _prepare_folders(plan: Sequence[Spoken], settings: dict[str, Any], options: SpeakOptions) -> None:
    """Makes the folders or accepts those of the same command. Raises UsageError for anything else at their place."""
    output = Path(options.output)
    if output.exists() and not output.is_dir():
        raise UsageError(f"output: {output} is a file, expected a folder")
    if not output.absolute().parent.is_dir():
        raise UsageError(f"output: {output.absolute().parent}: no such folder")
    ours = [_is_ours(spoken, settings, options) for spoken in plan]
    output.mkdir(exist_ok=True)
    for spoken, same in zip(plan, ours):
        if not same:
            spoken.file.unlink(missing_ok=True)
            if spoken.folder.exists():
                shutil.rmtree(spoken.folder)
            spoken.folder.mkdir()
            questions = {composite_name(s): r.text for s, r in zip(spoken.samples, spoken.recordings)}
            write_json_atomic(spoken.folder / SPOKEN, {**settings, "questions": questions})


def _is_ours(spoken: Spoken, settings: dict[str, Any], options: SpeakOptions) -> bool:
    """Whether the same command made the folder; False if there is none, or if --force replaces it."""
    if os.path.lexists(spoken.file) and os.path.realpath(spoken.file) == os.path.realpath(options.file):
        raise UsageError(f"{spoken.file} is the file to speak and would be replaced; name another --output")
    record = spoken.folder / SPOKEN
    if not record.is_file():
        for path in (spoken.file, spoken.folder):
            if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
                raise UsageError(f"{path} already exists and was not made by `speak`; name another --output")
        return False
    made = read_json(record)
    changed = [key for key in settings if made.get(key) != settings[key]]
    if changed and not options.force:
        what = changed[0].removesuffix("_sha256")
        raise UsageError(
            f"{spoken.folder} was made with other settings ({what} changed); name another --output, or replace it "
            "with --force"
        )
    return not changed


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Locks the folder against other `speak` commands, if the file system supports locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UsageError(f"{folder}: another `surgvqa speak` is working there; wait for it or stop it") from None
    except OSError:
        pass
    try:
        yield
    finally:
        os.close(descriptor)


# --- speaking ---------------------------------------------------------------------------------------------------------


def _speak(engine: Engine, plan: Sequence[Spoken]) -> int:
    """Makes the missing recordings. Returns how many were synthesised, without links."""
    files: dict[Recording, list[Path]] = defaultdict(list)
    for spoken in plan:
        for sample, recording in zip(spoken.samples, spoken.recordings):
            files[recording].append(spoken.path(sample))
    alike: dict[tuple[str, str, float], list[Recording]] = defaultdict(list)
    """{(text, voice, speed): recordings that differ only in noise}."""
    for recording in files:
        alike[recording.text, recording.voice, recording.speed].append(recording)
    one_at_a_time = threading.Lock()

    def make(utterance: tuple[str, str, float]) -> int:
        wave, rate, made = None, 0, 0
        for recording in alike[utterance]:
            paths = list(dict.fromkeys(files[recording]))
            there = [path for path in paths if _is_complete(path)]
            if not there:
                if wave is None:
                    with one_at_a_time:
                        wave, rate = engine.say(*utterance)
                    _refuse_long(recording, len(wave) / rate)
                _write_sound(paths[0], with_noise(wave, recording.noise_db), rate)
                there, made = paths[:1], made + 1
            for path in paths:
                if path not in there:
                    _link(there[0], path)
        return made

    return sum(in_threads(make, alike, "speaking"))


def _refuse_long(recording: Recording, seconds: float) -> None:
    if seconds > WINDOW_S:
        raise UsageError(
            f"{shortened(recording.text)} takes {seconds:.1f} s at speed {recording.speed:g}, expected at most the "
            f"audio encoder's window of {WINDOW_S:g} s"
        )


def _is_complete(path: Path) -> bool:
    """Whether the recording exists and is not empty, as it may be after a power cut."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return False
    return bool(content) and missing_part(content) is None


def _write_sound(path: Path, wave: np.ndarray, rate: int) -> None:
    import soundfile

    sound = io.BytesIO()
    soundfile.write(sound, wave, rate, format="MP3")
    _write_atomic(sound.getvalue(), path)


def _write_atomic(content: bytes, path: Path) -> None:
    """Writes a file atomically. Raises SurgvqaError when it cannot be written."""
    beside = path.with_name(f".{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise SurgvqaError(
                f"{path.parent}: cannot be written: {error.strerror}; the same command continues"
            ) from None
        raise


def _link(recording: Path, path: Path) -> None:
    """Links the recording under another name, or copies it if the file system allows no (more) links."""
    path.unlink(missing_ok=True)
    try:
        os.link(recording, path)
    except OSError:
        _write_atomic(recording.read_bytes(), path)


def _write_samples(source: str, spoken: Spoken) -> None:
    """Writes the lines with the new question and how it is spoken. Other fields are unchanged."""
    lines = []
    records = [record for _, record in read_objects(source, "a JSONL file of samples")]
    if len(records) != len(spoken.samples):
        raise SurgvqaError(f"{source}: the file changed meanwhile; try again")
    for record, recording in zip(records, spoken.recordings):
        if not isinstance(record, dict):
            raise SurgvqaError(f"{source}: the file changed meanwhile; try again")
        how = {"voice": recording.voice, "speed": recording.speed, "noise_db": recording.noise_db}
        lines.append(json_line({**record, "question": recording.text, **how}))
    beside = spoken.folder / f".{os.getpid()}.tmp"
    write_synced(beside, b"".join(lines))
    os.replace(beside, spoken.file)


# --- saying what was made ---------------------------------------------------------------------------------------------


def _summary(spoken: Spoken) -> dict[str, Any]:
    def counts(name: str) -> dict[str, int]:
        found = Counter(str(value) for r in spoken.recordings if (value := getattr(r, name)) is not None)
        none = sum(getattr(r, name) is None for r in spoken.recordings)
        return dict(sorted(found.items())) | ({"none": none} if none else {})

    wordings: dict[str, set[str]] = defaultdict(set)
    for sample, recording in zip(spoken.samples, spoken.recordings):
        wordings[sample.question_type].add(recording.text)
    return {
        "file": str(spoken.file),
        "audio_dir": str(spoken.folder),
        "samples": len(spoken.samples),
        "recordings": len(set(spoken.recordings)),
        "wordings": {kind: len(texts) for kind, texts in sorted(wordings.items())},
        **{name: counts(name) for name in ("voice", "speed", "noise_db")},
    }


def _warnings(plan: Sequence[Spoken], other_wordings: bool, other_voices: bool) -> list[str]:
    if len(plan) == 1:
        return ["nothing is held out: neither wordings nor voices"]
    if not other_wordings:
        return [f"{plan[1].file.name}: its voices are held out, its wordings are not (--wordings FILE with [held_out])"]
    return [] if other_voices else [f"{plan[1].file.name}: its wordings are held out, its voices are not"]


def _show(console: Console, data: dict[str, Any]) -> None:
    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
    table.add_column("file", overflow="fold")
    for heading in ("samples", "recordings", "wordings", "voices", "speeds", "noise"):
        table.add_column(heading, justify="right")
    for file in data["files"]:
        kinds = (len(file[name]) for name in ("voice", "speed", "noise_db"))
        numbers = (file["samples"], file["recordings"], sum(file["wordings"].values()), *kinds)
        table.add_row(plain(file["file"]), *(f"{number:,}" for number in numbers))
    console.print(table)
    for text in data["warnings"]:
        console.print(plain(one_line(text)), style="yellow")
    console.print(f"{counted(data['recordings_made'], 'new recording')} in {human_seconds(data['seconds'])}")
    for file in data["files"]:
        console.print(
            plain(one_line(f"surgvqa check-data {file['file']} --audio_dir {file['audio_dir']}")), style="dim"
        )
