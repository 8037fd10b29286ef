"""`check-data --as_trained FILE`: the audio and the frames that an old run really used for each sample.

FILE is the run's W&B `wandb-metadata.json` or a text file with its command line. The author's training script read the
spoken question from `<audio_dir>/<id>.mp3` and each frame from `<frames_dir>/<video_id>/<frame>.jpg`. It replaced a
missing file by two seconds of silence or a black image. This module applies the same rules to the given folders.

FILE is never trusted: only five options are read from it, nothing in it is run or expanded, and its folders are
searched only below the given folders (or the current one).
"""

from __future__ import annotations

import os
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from surgvqa.data.lookup import SIDES
from surgvqa.data.samples import Sample
from surgvqa.errors import UsageError
from surgvqa.untrusted import load_json, not_utf8, one_line

LARGEST_FILE = 1_000_000
READ = ("train_data_path", "eval_data_path", "frames_dir", "audio_dir", "eval_audio_dir")
AUDIO, FRAME = ".mp3", ".jpg"
"""The only file extensions that the old script used."""
EXAMPLES = 5


@dataclass
class Replay:
    """What the old run used for the samples of one file: numbers of samples, except black_frames."""

    file: str
    audio_dir: str | None
    frames_dir: str | None
    samples: int
    own: int = 0
    """Heard a recording that asks their question, as far as names and contents show."""
    other_wording: int = 0
    """Heard their question in the other template's wording."""
    another: int = 0
    """Heard another sample's question."""
    unclear: int = 0
    """Share one recording with samples that ask something else; nothing shows which question it asks."""
    unclear_wrong_at_least: int = 0
    """Lower bound for how many of these heard another sample's question, whichever question the recording asks."""
    silence: int = 0
    """Had no recording and heard two seconds of silence."""
    with_black_frames: int = 0
    all_black: int = 0
    black_frames: int = 0
    examples: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        """Whether every sample heard its question and saw its frames."""
        return not (self.other_wording or self.another or self.unclear or self.silence or self.with_black_frames)


def replay(
    file: str, groups: Sequence[tuple[str, Sequence[Sample]]], frames_dir: str | None, audio_dir: str | None
) -> dict[str, Any]:
    """{"file", "command": the options read, "files": a Replay for each (path, samples) of `groups`}.

    The old run's folders are searched below `frames_dir` and `audio_dir`. A group with the name of the old
    `--eval_data_path` or, if no name matches, every group but the first uses the old evaluation's audio.
    Raises UsageError when FILE is not such a file or a folder is missing.
    """
    command = read_command(file)
    rows = []
    for number, (path, samples) in enumerate(groups):
        names = {key: Path(command[key]).name for key in ("train_data_path", "eval_data_path") if command.get(key)}
        name = Path(path).name
        later = name == names.get("eval_data_path") if name in names.values() else number > 0
        old_audio = (command.get("eval_audio_dir") if later else None) or command.get("audio_dir")
        sound = _local_folder("audio_dir", old_audio, audio_dir, file)
        frames = _local_folder("frames_dir", command.get("frames_dir"), frames_dir, file)
        row = Replay(path, str(sound), str(frames), len(samples))
        _count_heard(row, sound, samples, [sample for _, group in groups for sample in group])
        _count_seen(row, frames, samples)
        rows.append(row)
    return {"file": file, "command": command, "files": [asdict(row) for row in rows], "ok": all(r.good for r in rows)}


def read_command(file: str) -> dict[str, str]:
    """The options in READ of an old command line, from a W&B metadata file or text. Raises UsageError without any."""
    expected = "expected a wandb-metadata.json or a text file with the old command line (… --audio_dir DIR …)"
    try:
        with open(file, "rb") as opened:
            content = opened.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise UsageError(f"{file}: over {LARGEST_FILE / 1e6:g} MB, {expected}")
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror or error}, {expected}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{file}: {not_utf8(error)}; {expected}") from None
    if text.lstrip().startswith("{"):
        try:
            arguments = load_json(text).get("args")
        except ValueError as error:
            raise UsageError(f"{file}: not valid JSON ({one_line(str(error))}), {expected}") from None
        if not isinstance(arguments, list) or not all(isinstance(a, str) for a in arguments):
            raise UsageError(f"{file}: args is not a list of texts, {expected}")
        commands = [arguments]
    else:
        commands = list(_command_lines(text, file))
    for words in commands:
        found = _options(words)
        if "audio_dir" in found or "frames_dir" in found:
            return found
    raise UsageError(f"{file}: has neither --audio_dir nor --frames_dir, {expected}")


def _command_lines(text: str, file: str) -> Iterable[list[str]]:
    """The words of each line that may be the command. A backslash at its end continues a line."""
    joined = text.replace("\r\n", "\n").replace("\\\n", " ")
    for line in joined.split("\n"):
        if "_dir" in line or "-dir" in line:
            try:
                yield shlex.split(line, comments=True)
            except ValueError as error:
                raise UsageError(f"{file}: the command line cannot be split ({error}); is a quote missing?") from None


def _options(words: Sequence[str]) -> dict[str, str]:
    found = {}
    for word, following in zip(words, [*words[1:], ""]):
        name, given, value = word.partition("=")
        key = name.removeprefix("--").replace("-", "_")
        value = value if given else following
        if name.startswith("--") and key in READ and value and not value.startswith("--"):
            found[key] = one_line(value)
    return found


def _local_folder(option: str, old: str | None, here: str | None, file: str) -> Path:
    """The local copy of an old folder: the longest end of its path that exists below `here`, or else `here` itself.

    Without `here`, searches below the current folder. Raises UsageError when there is no such folder.
    """
    root = Path(here or ".")
    parts = [part for part in Path(old or "").parts if part not in ("/", ".")]
    if ".." not in parts:
        for first in range(len(parts)):
            folder = root.joinpath(*parts[first:])
            if folder.is_dir() and folder.resolve().is_relative_to(root.resolve()):
                return folder
            if parts[first:] == [root.resolve().name]:
                return root
    if here:
        if not root.is_dir():
            raise UsageError(f"{here}: no such folder ({option})")
        return root
    named = f"{one_line(old)} of {file}" if old else f"{file} names none"
    raise UsageError(f"{option}: {named} is not below the current folder; name yours with --{option}")


# --- hearing ----------------------------------------------------------------------------------------------------------


def _count_heard(row: Replay, folder: Path, samples: Sequence[Sample], known: Sequence[Sample]) -> None:
    """Counts what the samples heard. `known`: the samples of all groups, which may use the same recording."""
    there = {name for name in _names(folder) if name.endswith(AUDIO)}
    askers: dict[str, list[Sample]] = defaultdict(list)
    for sample in known:
        askers[sample.id].append(sample)
    shared: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        file = folder / (sample.id + AUDIO)
        if file.name not in there:
            row.silence += 1
            _add_example(row, f"{sample.place}: silence, no {file}")
            continue
        speakers = _possible_askers(folder, sample, askers[sample.id])
        wordings = {speaker.wording for speaker in speakers}
        if len(wordings) > 1 and sample.wording in wordings:
            shared[sample.id].append(sample)
        elif sample.wording in wordings:
            row.own += 1
        elif any((s.video_id, s.question_type) == (sample.video_id, sample.question_type) for s in speakers):
            row.other_wording += 1
            _add_example(row, f"{sample.place}: {file} asks its question in the other template's wording")
        else:
            row.another += 1
            _add_example(row, f"{sample.place}: {file} asks another sample's question")
    for name, group in shared.items():
        most = max(Counter(sample.wording for sample in group).values())
        row.unclear += len(group)
        row.unclear_wrong_at_least += len(group) - most
        _add_example(row, f"{group[0].place}: {folder / (name + AUDIO)} is heard by samples with different questions")


def _possible_askers(folder: Path, sample: Sample, askers: Sequence[Sample]) -> list[Sample]:
    """The samples among `askers` (all with this id) whose question the recording may ask; [] for an unknown video."""
    side, video = _parse_folder_name(folder)
    if video is not None:  # the folder belongs to one video and one side
        return [s for s in askers if s.video_id == video and _side(s) in (None, side)]
    return _with_same_recording(folder, sample.id, askers) or list(askers)


def _with_same_recording(folder: Path, name: str, askers: Sequence[Sample]) -> list[Sample]:
    """The samples of the video whose own subfolder has the same recording, byte for byte; [] if there is none."""
    videos = {s.video_id for s in askers}
    if len({s.wording for s in askers}) < 2:
        return []
    content = (folder / (name + AUDIO)).read_bytes()
    for video in sorted(videos):
        for deeper, side in ((video, None), *((f"{side}_{video}", side) for side in SIDES)):
            file = folder / deeper / (name + AUDIO)
            if file.is_file() and file.stat().st_size == len(content) and file.read_bytes() == content:
                return [s for s in askers if s.video_id == video and (side is None or _side(s) in (None, side))]
    return []


def _parse_folder_name(folder: Path) -> tuple[str | None, str | None]:
    """(side, video) of a folder named `in_<video_id>` or `out_<video_id>`."""
    side, _, video = folder.resolve().name.partition("_")
    return (side, video) if side in SIDES and video else (None, None)


def _side(sample: Sample) -> str | None:
    return next((side for side in SIDES if Path(sample.file).name.startswith(f"{side}_")), None)


# --- seeing -----------------------------------------------------------------------------------------------------------


def _count_seen(row: Replay, folder: Path, samples: Sequence[Sample]) -> None:
    there = {video: _names(folder / video) for video in {sample.video_id for sample in samples}}
    for sample in samples:
        black = [frame for frame in sample.frames if frame + FRAME not in there[sample.video_id]]
        row.black_frames += len(black)
        row.with_black_frames += bool(black)
        row.all_black += len(black) == len(sample.frames)
        if black:
            _add_example(row, f"{sample.place}: black, no {folder / sample.video_id / (black[0] + FRAME)}")


def _names(folder: Path) -> set[str]:
    """Names of the folder's non-empty files; empty if there is no folder."""
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file() and entry.stat().st_size}
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except OSError as error:
        raise UsageError(f"{folder}: {error.strerror}, expected a folder that can be listed") from None


def _add_example(row: Replay, text: str) -> None:
    if len(row.examples) < EXAMPLES:
        row.examples.append(text)
