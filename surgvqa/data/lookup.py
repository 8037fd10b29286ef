"""Frames and spoken questions found on disk by what a sample says of them."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from surgvqa.data.samples import Sample, read_samples, shortened
from surgvqa.errors import UsageError

FRAME_EXTENSIONS = (".jpg", ".jpeg", ".png")
AUDIO_EXTENSIONS = (".mp3", ".wav", ".flac", ".ogg", ".m4a")
SIDES = ("in", "out")
"""The real set has each sample's question in two wordings: in-template and out-of-template, in folders of their own."""


class MissingFile(UsageError):
    """A frame or a spoken question that is not where it should be."""


class FrameIndex:
    """Where frames lie: `<frames_dir>/<video_id>/<frame>.jpg` or `<frames_dir>/<video_id>/<number>.jpg` (.jpeg, .png).

    A video's folder is listed once, when its first frame is asked for.
    """

    def __init__(self, frames_dir: str | os.PathLike[str]):
        self.root = Path(frames_dir)
        if not self.root.is_dir():
            raise UsageError(f"{self.root}: no such folder of frames (frames_dir)")
        self._folders: dict[str, dict[str, str]] = {}

    def find(self, frame: str) -> Path:
        """The file of frame `<video_id>_<number>`. Raises MissingFile that names what was tried."""
        video_id, _, number = frame.rpartition("_")
        if video_id not in self._folders:
            self._folders[video_id] = _files_by_stem(self.root / video_id, FRAME_EXTENSIONS)
        files = self._folders[video_id]
        name = files.get(frame) or files.get(number)
        if name:
            return self.root / video_id / name
        if not (self.root / video_id).is_dir():
            raise MissingFile(f"frame {frame} is missing: no folder {self.root / video_id}")
        raise MissingFile(
            f"frame {frame} is missing: no {frame}.jpg or {number}.jpg (nor .jpeg, .png) in {self.root / video_id}"
        )


def _files_by_stem(folder: Path, extensions: Sequence[str]) -> dict[str, str]:
    """{stem: file name} of the files with one of the extensions, the earlier extension winning; {} without a folder."""
    found: dict[str, tuple[int, str]] = {}
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries]
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise UsageError(f"{folder}: {error.strerror}, expected a folder that can be listed") from None
    for name in names:
        stem, extension = os.path.splitext(name)
        if extension.lower() in extensions:
            candidate = extensions.index(extension.lower()), name
            found[stem] = min(found.get(stem, candidate), candidate)
    return {stem: name for stem, (_, name) in found.items()}


class AudioIndex:
    """Which file speaks a sample's question, never another sample's.

    Looked for in this order, as .mp3, .wav, .flac, .ogg or .m4a:

    1. `<audio_dir>/<video_id>/<id>`
    2. `<audio_dir>/in_<video_id>/<id>`, `<audio_dir>/out_<video_id>/<id>`
    3. `<audio_dir>/<video_id>_<id>_<question_type>`
    4. `<audio_dir>/<id>`

    A file serves only while its name stands for one question among the samples at hand: 4 while the id has one
    question, 1 and 2 while it has one in its video. When none serves, the error names both lines.

    In-template and out-of-template wordings are kept apart: a sample whose JSONL file is named `in_…` is never given a
    file out of a folder `out_…` (audio_dir itself included), and the other way round. When the JSONL's name does not
    say it and both folders have the id, the question sets `in_<video_id>.jsonl` and `out_<video_id>.jsonl`, beside the
    sample's own file or in audio_dir, say which of the two wordings the sample's question is. Failing that, the error
    names both files.
    """

    def __init__(self, audio_dir: str | os.PathLike[str], samples: Iterable[Sample]):
        self.root = Path(audio_dir)
        if not self.root.is_dir():
            raise UsageError(f"{self.root}: no such folder of spoken questions (audio_dir)")
        self._folders: dict[str, dict[str, str]] = {}
        self._wordings: dict[Path, dict[tuple[str, str], set[str]]] = {}
        self._first: dict[tuple[str, ...], dict[str, Sample]] = defaultdict(dict)
        """For each key that a file may be named by: its questions, each with the first sample that asks it."""
        for sample in samples:
            for key in ((sample.id,), (sample.id, sample.video_id), (sample.id, sample.video_id, sample.question_type)):
                self._first[key].setdefault(sample.wording, sample)

    def find(self, sample: Sample) -> Path:
        """The sample's spoken question. Raises MissingFile (names every path tried) or UsageError (cannot be told)."""
        unclear = None
        for place in (self._in_video_folder, self._in_side_folder, self._composite, self._flat):
            try:
                if found := place(sample):
                    return found
            except UsageError as error:
                unclear = unclear or error
        if unclear:
            raise unclear
        side = _side_of(sample)
        folders = "".join(f"{folder}/{sample.id}, " for folder in (sample.video_id, *_side_folders(sample)))
        raise MissingFile(
            f"{sample.place}: no spoken question in {self.root}: tried {folders}{_composite(sample)}, {sample.id}"
            f" ({' '.join(AUDIO_EXTENSIONS)})"
            + (f"; {Path(sample.file).name} needs the {side}-template wording" if side else "")
        )

    def _in_video_folder(self, sample: Sample) -> Path | None:
        return self._unless_shared(self._file(sample.video_id, sample.id), (sample.id, sample.video_id), sample)

    def _in_side_folder(self, sample: Sample) -> Path | None:
        key = sample.id, sample.video_id
        found = {folder: file for folder in _side_folders(sample) if (file := self._file(folder, sample.id))}
        if len(found) < 2:
            return self._unless_shared(next(iter(found.values()), None), key, sample)
        folder = next((f for f in found if sample.wording in self._wordings_of(f, sample)), None)
        if folder is None:
            question_sets = " and ".join(f"{f}.jsonl" for f in found)
            raise UsageError(
                f"{sample.place}: two spoken questions fit, {' and '.join(map(str, found.values()))}; name one's folder"
                f" as audio_dir, or put the question sets {question_sets} beside the samples"
            )
        return self._unless_shared(found[folder], key, sample, among=self._wordings_of(folder, sample))

    def _composite(self, sample: Sample) -> Path | None:
        key = sample.id, sample.video_id, sample.question_type
        return self._unless_shared(self._directly(_composite(sample), sample), key, sample)

    def _flat(self, sample: Sample) -> Path | None:
        return self._unless_shared(self._directly(sample.id, sample), (sample.id,), sample)

    def _directly(self, stem: str, sample: Sample) -> Path | None:
        """A file of audio_dir itself, unless that is a folder of the other wording."""
        return self._file("", stem) if _agree(_side(self.root.resolve().name), _side_of(sample)) else None

    def _wordings_of(self, folder: str, sample: Sample) -> set[str]:
        """What `<folder>.jsonl`, beside the samples or in audio_dir, asks under the sample's id; empty without one."""
        for place in (Path(sample.file).parent, self.root):
            file = place / f"{folder}.jsonl"
            if file not in self._wordings:
                asked = defaultdict(set)
                for other in read_samples(file) if file.is_file() else []:
                    asked[other.video_id, other.id].add(other.wording)
                self._wordings[file] = asked
            if wordings := self._wordings[file].get((sample.video_id, sample.id)):
                return wordings
        return set()

    def _file(self, folder: str, stem: str) -> Path | None:
        if folder not in self._folders:
            self._folders[folder] = _files_by_stem(self.root / folder, AUDIO_EXTENSIONS)
        name = self._folders[folder].get(stem)
        return self.root / folder / name if name else None

    def _unless_shared(
        self, file: Path | None, key: tuple[str, ...], sample: Sample, among: set[str] | None = None
    ) -> Path | None:
        """`file`; UsageError when another question of the samples (if in `among`) goes by the same name."""
        others = [s for w, s in self._first[key].items() if w != sample.wording and (among is None or w in among)]
        if file and others:
            other = others[0]
            raise UsageError(
                f"{sample.place}: {file} stands for two questions: {shortened(sample.question)} "
                f"(video {sample.video_id}) and at {other.place} {shortened(other.question)} "
                f"(video {other.video_id}); each needs its own file,"
                f" {self.root}/<video_id>/<id>{file.suffix} or <video_id>_<id>_<question_type>{file.suffix}"
            )
        return file


def _composite(sample: Sample) -> str:
    """The name that the author's later scripts give a spoken question."""
    return f"{sample.video_id}_{sample.id}_{sample.question_type}"


def _side(name: str) -> str | None:
    """in or out, when a file or folder name begins so."""
    return next((side for side in SIDES if name.startswith(f"{side}_")), None)


def _side_of(sample: Sample) -> str | None:
    return _side(Path(sample.file).name)


def _agree(folder_side: str | None, sample_side: str | None) -> bool:
    return folder_side is None or sample_side is None or folder_side == sample_side


def _side_folders(sample: Sample) -> list[str]:
    return [f"{side}_{sample.video_id}" for side in SIDES if _agree(side, _side_of(sample))]


def check_samples(jsonl: str, frames_dir: str, audio_dir: str) -> list[Sample]:
    """Reads the JSONL file and finds every frame and spoken question of it; UsageError for the first that fails."""
    samples = read_samples(jsonl)
    frames, audio = FrameIndex(frames_dir), AudioIndex(audio_dir, samples)
    for sample in samples:
        audio.find(sample)
        for frame in sample.frames:
            try:
                frames.find(frame)
            except UsageError as error:
                raise UsageError(f"{sample.place}: {error}") from None
    return samples
