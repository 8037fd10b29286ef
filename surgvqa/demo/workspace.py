"""Makes the demo workspace: checkpoint, adapters, frames, spoken questions, JSONL files, presets and surgvqa.toml.

Everything follows from the seed. `demo.json` is written first and says what is being made, and last with the size of
every file, so that a whole workspace is known from a half-made one, and ours from somebody else's folder.
"""

from __future__ import annotations

import csv
import json
import os
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgvqa.config.options import BUDGET_GB
from surgvqa.config.workspace import WORKSPACE_FILE
from surgvqa.data.boxes import COLUMNS
from surgvqa.demo.questions import QUESTION_TYPES, QuestionType
from surgvqa.demo.shots import CLIP_FRAMES, Clip, Shot, clips_of, draw_shots
from surgvqa.errors import SurgvqaError, UsageError
from surgvqa.files import write_json_atomic
from surgvqa.terminal.figures import human_seconds

if TYPE_CHECKING:
    import numpy as np

MANIFEST, BOXES = "demo.json", "boxes.csv"
FOLDERS = ("stage1", "stage2", "frames", "audio", "presets")
VERSION = 6
"""Of the generator: raise it when the same seed gives other files."""
TRAIN_VIDEO, EVAL_VIDEO = "101-001", "101-002"
JPEG_QUALITY = 82
IMAGE_SIZE = 112
"""Longest side of the frames that the demo's first preset shows, in pixels."""
WORD_LISTS = 400
"""Lists of spoken words that Stage 1 hears."""

Observer = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Split:
    """One JSONL file: its video, how many shots it has (25 a group) and how many samples a question type."""

    file: str
    video_id: str
    wording: str
    """in | out: template of the spoken questions"""
    groups: int
    samples_a_type: int
    twins: bool = True
    """Whether opposite ways of moving are filmed at the same place (shots.py)."""


SPLITS = (Split("train.jsonl", TRAIN_VIDEO, "in", 3, 80), Split("eval.jsonl", EVAL_VIDEO, "out", 1, 12, twins=False))


@dataclass(frozen=True)
class Made:
    """A whole demo workspace."""

    folder: Path
    manifest: dict[str, Any]
    reused: bool
    seconds: float

    def data(self) -> dict[str, Any]:
        """What --json prints."""
        counts = self.manifest["counts"]
        return {"workspace": str(self.folder), "reused": self.reused, "seconds": round(self.seconds, 2), **counts}

    def show(self, console) -> None:
        counts = self.manifest["counts"]
        how = "is whole already" if self.reused else f"made in {human_seconds(self.seconds)}"
        console.print(
            f"{self.folder} {how}: {counts['train_samples']} training and {counts['eval_samples']} evaluation samples, "
            f"{counts['frames']} frames, {counts['bytes'] / 1e6:.0f} MB"
        )
        console.print(f"next: surgvqa demo {self.folder} --run, or surgvqa-tui --workspace {self.folder}")


# --- ours or not -----------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """demo.json of the folder; None when there is none (or it is not ours)."""
    try:
        document = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) and document.get("made_by") == "surgvqa demo" else None


def require_ours(folder: Path, seed: int) -> None:
    """UsageError unless `folder` is absent, empty, or a demo of this seed made by this version."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UsageError(f"{folder}: is a file, expected a folder to make the demo in")
    manifest = read_manifest(folder)
    if manifest is None:
        if any(folder.iterdir()):
            raise UsageError(f"{folder}: is not empty and not made by surgvqa demo; name a new folder")
    elif (manifest.get("seed"), manifest.get("version")) != (seed, VERSION):
        raise UsageError(
            f"{folder}: holds a demo of seed {manifest.get('seed')} (version {manifest.get('version')}), "
            f"asked for seed {seed} (version {VERSION}); name another folder, or delete this one"
        )


def is_whole(folder: Path, manifest: dict[str, Any]) -> bool:
    """Whether every file stands there with its size."""
    files = manifest.get("files")
    if not files:
        return False
    try:
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except OSError:
        return False


# --- making it -------------------------------------------------------------------------------------------------------


def make_workspace(folder: Path, seed: int, observe: Observer = lambda event: None) -> Made:
    """The demo workspace in `folder`; a whole one of the same seed is left as it is. Events go to `observe`."""
    began = time.monotonic()
    folder = folder.resolve()
    require_ours(folder, seed)
    manifest = read_manifest(folder)
    if manifest and is_whole(folder, manifest):
        return Made(folder, manifest, True, time.monotonic() - began)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        about = {"made_by": "surgvqa demo", "version": VERSION, "seed": seed}
        write_json_atomic(folder / MANIFEST, about)
        samples = _write_all(folder, seed, observe)
        files = {
            str(path.relative_to(folder)): path.stat().st_size
            for part in (
                "stage1",
                "stage2",
                "frames",
                "audio",
                "presets",
                *(s.file for s in SPLITS),
                BOXES,
                WORKSPACE_FILE,
            )
            for path in ([folder / part] if (folder / part).is_file() else sorted((folder / part).rglob("*.*")))
            if path.is_file()
        }
        counts = {
            **{f"{Path(file).stem}_samples": len(rows) for file, rows in samples.items()},
            "question_types": len(QUESTION_TYPES),
            "frames": sum(name.startswith("frames/") for name in files),
            "bytes": sum(files.values()),
        }
        manifest = {**about, "counts": counts, "files": files}
        write_json_atomic(folder / MANIFEST, manifest)
    except OSError as error:
        raise SurgvqaError(f"{error.filename or folder}: cannot write the demo: {error.strerror}") from None
    return Made(folder, manifest, False, time.monotonic() - began)


def _write_all(folder: Path, seed: int, observe: Observer) -> dict[str, list[dict[str, Any]]]:
    """Every file of the workspace; returns the samples of each JSONL file. Frames are drawn by all cores meanwhile."""
    import numpy as np

    rng = np.random.default_rng([seed, 0])
    shots = {split.file: draw_shots(rng, split.video_id, split.groups, split.twins) for split in SPLITS}
    all_shots = [shot for group in shots.values() for shot in group]
    for split in SPLITS:
        (folder / "frames" / split.video_id).mkdir(parents=True, exist_ok=True)
        (folder / "audio" / f"{split.wording}_{split.video_id}").mkdir(parents=True, exist_ok=True)
    observe({"kind": "phase", "name": "demo", "text": f"frames, speech, weights -> {folder}"})
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        drawing = [pool.submit(draw_frames, shot, seed, folder / "frames") for shot in all_shots]
        samples, first_id = {}, 1
        for split in SPLITS:
            rows = draw_samples(rng, split, clips_of(shots[split.file]), first_id)
            first_id += len(rows)
            speak_questions(rng, rows, folder / "audio" / f"{split.wording}_{split.video_id}")
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / split.file).write_text(lines, encoding="utf-8")
            samples[split.file] = rows
        _write_settings(folder)
        drawn, total = 0, sum(shot.length for shot in all_shots)
        for future in as_completed(drawing):
            drawn += len(future.result())
            observe({"kind": "progress", "phase": "demo", "done": drawn, "total": total, "unit": "frames"})
    write_boxes(folder / BOXES, [row for future in drawing for row in future.result()])
    observe({"kind": "phase", "name": "stage 1", "text": "fitting the encoders' outputs to the language model"})
    _write_checkpoints(folder, seed, samples)
    return samples


def draw_frames(shot: Shot, seed: int, frames: Path) -> list[tuple[object, ...]]:
    """Draws and writes a shot's frames; a row of boxes.csv for each. Runs in a worker process."""
    from surgvqa.demo.paint import HEIGHT, WIDTH, Painter

    painter, rows = Painter(shot, seed), []
    for i in range(shot.length):
        painter.frame(i).save(frames / shot.video_id / f"{shot.frame_name(i)}.jpg", quality=JPEG_QUALITY)
        box = painter.lesion_box(i) or ("",) * 4
        rows.append((shot.frame_name(i), WIDTH, HEIGHT, f"{shot.video_id}_{shot.number}", *box))
    return rows


def write_boxes(file: Path, rows: Iterable[Sequence[object]]) -> None:
    """Where the lesion is in each frame, as `--boxes` reads it."""
    with open(file, "w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([COLUMNS, *rows])


def draw_samples(rng: np.random.Generator, split: Split, clips: Sequence[Clip], first_id: int) -> list[dict[str, Any]]:
    """The lines of one JSONL file, in the real files' keys and order: as many of each label as of its rivals."""
    chosen: list[tuple[QuestionType, str, Clip]] = []
    for question_type in QUESTION_TYPES:
        by_label: dict[str, list[Clip]] = defaultdict(list)
        for i in rng.permutation(len(clips)):
            label = question_type.label(clips[i].shot)
            if label is not None:
                by_label[label].append(clips[i])
        each = min(split.samples_a_type // len(question_type.answers), *map(len, by_label.values()))
        for label in question_type.answers:
            chosen += [(question_type, label, clip) for clip in by_label[label][:each]]
    rows = []
    for number, i in enumerate(rng.permutation(len(chosen)), first_id):
        question_type, label, clip = chosen[i]
        wordings = question_type.in_template if split.wording == "in" else (question_type.out_of_template,)
        rows.append(
            {
                "id": f"qa_{number:06d}",
                "video_id": split.video_id,
                "frames": clip.frames,
                "frame_numbers": clip.frame_numbers,
                "question": wordings[rng.integers(len(wordings))],
                "question_type": question_type.name,
                "support_frames": CLIP_FRAMES,
                "total_frames": CLIP_FRAMES,
                "support_ratio": 1.0,
                "support_percentage": 100.0,
                "answer": question_type.answers[label],
                "short_answer": label,
            }
        )
    return rows


def speak_questions(rng: np.random.Generator, rows: Iterable[dict[str, Any]], folder: Path) -> None:
    """`folder`/<id>.mp3 of every row's question, each by a voice of its own."""
    import soundfile

    from surgvqa.prepare.espeak import Synthesiser, draw_voice

    with Synthesiser() as synthesiser:
        for row in rows:
            wave = synthesiser.speak(row["question"], draw_voice(rng))
            soundfile.write(folder / f"{row['id']}.mp3", wave, synthesiser.sample_rate)


def _write_checkpoints(folder: Path, seed: int, samples: dict[str, list[dict[str, Any]]]) -> None:
    from surgvqa.demo import stage1 as fitting
    from surgvqa.demo.tokenizer import write_tokenizer
    from surgvqa.demo.weights import DemoSizes, write_adapter, write_stage1

    stage1, stage2 = folder / "stage1", folder / "stage2"
    stage1.mkdir(exist_ok=True)
    stage2.mkdir(exist_ok=True)
    special_ids = write_tokenizer(stage1, training_text())
    write_stage1(stage1, DemoSizes(), special_ids, seed)
    rows = samples[SPLITS[0].file]
    frames = sorted({folder / "frames" / row["video_id"] / f"{row['frames'][i]}.jpg" for row in rows for i in (0, -1)})
    projector = fitting.fit(stage1, frames, IMAGE_SIZE, spoken_words(), WORD_LISTS, seed)
    write_adapter(stage2, DemoSizes(), projector, seed)


def spoken_words() -> list[str]:
    """Every word of every question, once."""
    questions = " ".join(" ".join((*q.in_template, q.out_of_template)) for q in QUESTION_TYPES)
    return sorted(set(re.findall(r"[\w-]+", questions)))


def training_text() -> list[str]:
    """What the tokenizer is trained on: the questions, the answers and the prompt."""
    texts = [
        "user\n<|audio_bos|>",
        "<|audio_eos|>\nYou are a helpful assistant.",
        "User Question: ",
        "Answer the question concisely based on the visual and audio evidence.",
        "assistant\n",
    ]
    for question_type in QUESTION_TYPES:
        texts += [*question_type.in_template, question_type.out_of_template, *question_type.answers.values()]
    return texts


# --- settings --------------------------------------------------------------------------------------------------------

SETTINGS = f"""\
# The demo's own settings; a command line goes before them, they go before a preset. `surgvqa train` needs no more.
preset = "demo-8f-112px"
budget_gb = 4.0  # of host memory here; {BUDGET_GB} on the real GPU

train_data_path = "{SPLITS[0].file}"
eval_data_path = "{SPLITS[1].file}"
frames_dir = "frames"
audio_dir = "audio"
boxes = "{BOXES}"

[merge]
stage1_model_path = "stage1"
stage2_adapter_path = "stage2"
output_path = "merged"
max_shard_size = "1MB"

[train]
model_name_or_path = "merged"
per_device_train_batch_size = 2  # a model that starts from nothing needs many small steps more than large ones
per_device_eval_batch_size = 16
gradient_accumulation_steps = 1
learning_rate = 2e-3
warmup_ratio = 0.05
lora_dropout = 0.0  # what it would keep from being learned by heart costs a fifth of the time
num_train_epochs = 6
eval_strategy = "epoch"
save_strategy = "epoch"
save_total_limit = 2
load_best_model_at_end = false
gradient_checkpointing = false  # the model is small; recomputing would only cost time

[evaluate]
batch_size = 16
"""

PRESETS = {
    "demo-8f-112px": (0, 8, 112, "The demo's first choice: every frame, 4x4 tokens each.", "nothing"),
    "demo-6f-112px": (1, 6, 112, "Two frames fewer; detail in each frame stays.", "a quarter of the clip"),
    "demo-8f-84px": (2, 8, 84, "Smaller frames; the whole clip stays.", "44 % of the pixels: thin tools blur"),
    "demo-6f-84px": (
        3,
        6,
        84,
        "Fewer, smaller frames: the last resort.",
        "a quarter of the clip, 44 % of the pixels",
    ),
}


def _write_settings(folder: Path) -> None:
    (folder / WORKSPACE_FILE).write_text(SETTINGS, encoding="utf-8")
    (folder / "presets").mkdir(exist_ok=True)
    for name, (rung, frames, pixels, reason, gives_up) in PRESETS.items():
        (folder / "presets" / f"{name}.toml").write_text(
            f'reason = "{reason}"\ngives_up = "{gives_up}"\nrung = {rung}\n\n'
            f"[settings]\nnum_frames = {frames}\nimage_size = {pixels}\n",
            encoding="utf-8",
        )
