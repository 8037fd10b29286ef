"""Finds the frames and the spoken question of a sample on disk."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from surgvqa.data.samples import Sample, read_samples, shortened, wording_of
from surgvqa.errors import UsageError
from surgvqa.files import read_json

FRAME_EXTENSIONS = (".jpg", ".jpeg", ".png")
AUDIO_EXTENSIONS = (".mp3", ".wav", ".flac", ".ogg", ".m4a")
SPOKEN = "speak.json"
"""File in a folder of recordings made by `surgvqa speak`, with its settings and the question of each recording."""
SIDES = ("in", "out")
"""The real dataset has each question in an in-template and an out-of-template wording, in separate folders."""


class MissingFile(UsageError):
    """A frame or a spoken question is missing."""


class FrameIndex:
    """Finds frames: `<frames_dir>/<video_id>/<frame>.jpg` or `<frames_dir>/<video_id>/<number>.jpg` (.jpeg, .png).

    A video's folder is listed once, when its first frame is looked up.
    """

    def __init__(self, frames_dir: str | os.PathLike[str]):
        self.root = Path(frames_dir)
        if not self.root.is_dir():
            raise UsageError(f"{self.root}: no such folder of frames (frames_dir)")
        self._folders: dict[str, dict[str, str]] = {}

    def find(self, frame: str) -> Path:
        """The file of frame `<video_id>_<number>`. Raises MissingFile, which names the paths tried."""
        return self.root / self.name_of(frame)

    def name_of(self, frame: str) -> str:
        """Like `find`, but returns `<video_id>/<file>`."""
        video_id, _, number = frame.rpartition("_")
        if video_id not in self._folders:
            self._folders[video_id] = _files_by_stem(self.root / video_id, FRAME_EXTENSIONS)
        files = self._folders[video_id]
        name = files.get(frame) or files.get(number)
        if name:
            return f"{video_id}/{name}"
        if not (self.root / video_id).is_dir():
            raise MissingFile(f"frame {frame} is missing: no folder {self.root / video_id}")
        raise MissingFile(
            f"frame {frame} is missing: no {frame}.jpg or {number}.jpg (nor .jpeg, .png) in {self.root / video_id}"
        )


def _files_by_stem(folder: Path, extensions: Sequence[str]) -> dict[str, str]:
    """{stem: file name} of the files with these extensions, in order of preference; {} if there is no folder."""
    found: dict[str, tuple[int, str]] = {}
    try:
        with os.scandir(folder) as entries:
            names = [e.name for e in entries if e.is_file(follow_symlinks=False) or _is_link_to_file(e)]
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise UsageError(f"{folder}: {error.strerror}, expected a folder that can be listed") from None
    ranks = {extension.removeprefix("."): rank for rank, extension in enumerate(extensions)}
    for name in names:
        stem, _, extension = name.rpartition(".")
        rank = ranks.get(extension.lower())
        if rank is not None and stem.strip("."):  # a name whose only dot is its first character has no extension
            candidate = rank, name
            found[stem] = min(found[stem], candidate) if stem in found else candidate
    return {stem: name for stem, (_, name) in found.items()}


def _is_link_to_file(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a link that leads to a file. Looks at the disk for links only."""
    return entry.is_symlink() and os.path.isfile(entry.path)


class AudioIndex:
    """Finds the recording of a sample's question, and never that of another sample.

    It tries these paths in order, as .mp3, .wav, .flac, .ogg or .m4a:

    1. `<audio_dir>/<video_id>/<id>`
    2. `<audio_dir>/in_<video_id>/<id>`, `<audio_dir>/out_<video_id>/<id>`
    3. `<audio_dir>/<video_id>_<id>_<question_type>`
    4. `<audio_dir>/<id>`

    A file is used only if its name stands for one question among the given samples: 4 if the id has only one question,
    1 and 2 if it has only one in its video. Otherwise the error names both lines.

    In-template and out-of-template wordings are kept separate: a sample whose JSONL file is named `in_…` never gets a
    file from a folder `out_…` (including audio_dir itself), and vice versa. If the JSONL's name does not say which, and
    both folders have the id, the question sets `in_<video_id>.jsonl` and `out_<video_id>.jsonl`, beside the sample's
    own file or in audio_dir, decide which of the two wordings the sample has. Without them, the error names both files.

    A folder made by `surgvqa speak` lists the question of each recording (3). A sample with another question is
    refused, and so is a file of samples with such a folder of its own beside it.
    """

    def __init__(self, audio_dir: str | os.PathLike[str], samples: Iterable[Sample]):
        self.root = Path(audio_dir)
        if not self.root.is_dir():
            raise UsageError(f"{self.root}: no such folder of spoken questions (audio_dir)")
        self._folders: dict[str, dict[str, str]] = {}
        self._wordings: dict[Path, dict[tuple[str, str], set[str]]] = {}
        self._asked = _questions_spoken(self.root)
        self._first: dict[tuple[str, ...], dict[str, Sample]] = defaultdict(dict)
        """{key of a file, (stem in audio_dir,) or (id, video): {wording: first sample that asks it}}."""
        own = ""
        for sample in samples:
            if self._asked and sample.file != own:
                _refuse_other_folder(own := sample.file, self.root)
            wording = sample.wording
            for key in {(sample.id,), (composite_name(sample),), (sample.id, sample.video_id)}:
                self._first[key].setdefault(wording, sample)

    def find(self, sample: Sample) -> Path:
        """The sample's recording. Raises MissingFile, which names all paths tried, or UsageError if it is ambiguous."""
        unclear = None
        for place in (self._in_video_folder, self._in_side_folder, self._by_composite_name, self._by_id):
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
            f"{sample.place}: no spoken question in {self.root}: tried {folders}{composite_name(sample)}, {sample.id}"
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

    def _by_composite_name(self, sample: Sample) -> Path | None:
        stem = composite_name(sample)
        found = self._unless_shared(self._in_audio_dir(stem, sample), (stem,), sample)
        asked = self._asked.get(stem)
        if found and isinstance(asked, str) and wording_of(asked) != sample.wording:
            raise UsageError(
                f"{sample.place}: {found} asks {shortened(asked)}, the sample {shortened(sample.question)}; "
                f"`surgvqa speak` made {self.root} for another file of samples"
            )
        return found

    def _by_id(self, sample: Sample) -> Path | None:
        return self._unless_shared(self._in_audio_dir(sample.id, sample), (sample.id,), sample)

    def _in_audio_dir(self, stem: str, sample: Sample) -> Path | None:
        """A file directly in audio_dir, unless that is the folder of the other wording."""
        return self._file("", stem) if _sides_agree(_side(self.root.resolve().name), _side_of(sample)) else None

    def _wordings_of(self, folder: str, sample: Sample) -> set[str]:
        """Wordings under the sample's id in `<folder>.jsonl`, beside the samples or in audio_dir; empty if none."""
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
        return self.root / (f"{folder}/{name}" if folder else name) if name else None

    def _unless_shared(
        self, file: Path | None, key: tuple[str, ...], sample: Sample, among: set[str] | None = None
    ) -> Path | None:
        """Returns `file`. Raises UsageError when another question of the samples (if in `among`) has the same file."""
        if file is None or len(self._first[key]) < 2:
            return file
        others = [s for w, s in self._first[key].items() if w != sample.wording and (among is None or w in among)]
        if others:
            other = others[0]
            raise UsageError(
                f"{sample.place}: {file} stands for two questions: {shortened(sample.question)} "
                f"(video {sample.video_id}) and at {other.place} {shortened(other.question)} "
                f"(video {other.video_id}); each needs its own file,"
                f" {self.root}/<video_id>/<id>{file.suffix} or <video_id>_<id>_<question_type>{file.suffix}"
            )
        return file


def _questions_spoken(root: Path) -> dict[str, Any]:
    """{name of the recording: its question} of a folder made by `surgvqa speak`; {} for any other."""
    file = root / SPOKEN
    questions = read_json(file).get("questions") if file.is_file() else None
    return questions if isinstance(questions, dict) else {}


def _refuse_other_folder(file: str, root: Path) -> None:
    """Raises UsageError if `surgvqa speak` made another folder than `root` for this file of samples.

    Their texts may be equal, because held-out samples may differ from the others only in their voices.
    """
    own = Path(file).with_suffix("")
    if (own / SPOKEN).is_file() and not own.samefile(root):
        raise UsageError(f"{file}: `surgvqa speak` put its recordings into {own}, not into {root}")


def composite_name(sample: Sample) -> str:
    """The name of a spoken question in the author's later scripts and in `speak`."""
    return f"{sample.video_id}_{sample.id}_{sample.question_type}"


def _side(name: str) -> str | None:
    """ "in" or "out" if a file or folder name begins with it, else None."""
    return next((side for side in SIDES if name.startswith(f"{side}_")), None)


def _side_of(sample: Sample) -> str | None:
    return _side(Path(sample.file).name)


def _sides_agree(folder_side: str | None, sample_side: str | None) -> bool:
    return folder_side is None or sample_side is None or folder_side == sample_side


def _side_folders(sample: Sample) -> list[str]:
    return [f"{side}_{sample.video_id}" for side in SIDES if _sides_agree(side, _side_of(sample))]


def check_samples(jsonl: str, frames_dir: str, audio_dir: str | None) -> list[Sample]:
    """Reads the samples of a JSONL file and finds all their frames and, with `audio_dir`, spoken questions.

    Raises UsageError for the first one that is missing.
    """
    samples = read_samples(jsonl)
    frames, audio = FrameIndex(frames_dir), AudioIndex(audio_dir, samples) if audio_dir is not None else None
    for sample in samples:
        if audio:
            audio.find(sample)
        for frame in sample.frames:
            try:
                frames.find(frame)
            except UsageError as error:
                raise UsageError(f"{sample.place}: {error}") from None
    return samples
