"""The provenance in run.json: versions, GPUs, the commit of our code, hashes of the inputs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import surgvqa
from surgvqa.data.lookup import AudioIndex, FrameIndex
from surgvqa.data.samples import Sample, read_samples
from surgvqa.errors import SurgvqaError
from surgvqa.machine import gpu
from surgvqa.provenance.hashes import Hashes, weight_files

COMPUTES = (
    *("torch", "triton", "transformers", "peft", "accelerate", "safetensors", "tokenizers", "huggingface-hub", "numpy"),
    *("flash-attn", "bitsandbytes", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "librosa", "soundfile", "pillow"),
)
"""Packages whose version may affect a result."""
GIT_S = 5.0
"""Time limit for git, on a slow disk."""
FILES = ("train_data_path", "eval_data_path")
FOLDERS = ("model_name_or_path", "checkpoint", "stage1_model_path", "stage2_adapter_path")
INPUTS = (*FILES, "frames", "audio", *FOLDERS)
"""Possible keys of `inputs` in run.json; see `hash_inputs`."""


def surroundings() -> dict[str, Any]:
    """`versions` (packages, Python, NVIDIA driver and its CUDA), `gpus` (name, uuid, memory) and `git`.

    Unknown values are absent.
    """
    versions = {"surgvqa": surgvqa.__version__, "python": sys.version.split()[0]}
    for name in COMPUTES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    cards = gpu.sample_devices()
    if cards:
        versions["nvidia-driver"], versions["cuda-of-driver"] = gpu.driver_version()
    torch = sys.modules.get("torch")
    if torch is not None and torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    elif "+cu" in versions.get("torch", ""):
        versions["cuda"] = versions["torch"].partition("+cu")[2]
    found: dict[str, Any] = {"versions": versions}
    found["gpus"] = [
        {name: card[name] for name in ("name", "uuid", "memory_total_bytes") if name in card} for card in cards
    ]
    if commit := git_state(Path(surgvqa.__file__).parent):
        found["git"] = commit
    return found


def git_state(folder: Path) -> dict[str, Any]:
    """{"commit", "dirty"} of the checkout that tracks `folder`/__init__.py; {} if none does.

    Dirty means that the engine or the presets differ from the commit.
    """

    def git(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        quiet = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_S, env=quiet, check=True)
        return done.stdout.strip()

    try:
        git(
            "ls-files", "--error-unmatch", "__init__.py"
        )  # excludes an unrelated repository around an installed package
        return {
            "commit": git("rev-parse", "HEAD"),
            "dirty": bool(git("status", "--porcelain", "--", ".", "../presets")),
        }
    except (OSError, subprocess.SubprocessError):
        return {}


# --- inputs -----------------------------------------------------------------------------------------------------------


def hash_inputs(
    options: Mapping[str, Any], hashes: Hashes, problem: Callable[[str], None] = lambda text: None
) -> dict[str, dict[str, Any]]:
    """{input: {"path", "sha256", "files"}} of the inputs that a run's options name.

    These are the JSONL files, folders of weights, and all frames and recordings of the samples (in a training, also of
    the training samples). The hash of several files is that of `sha256sum`'s list of them (Hashes.of_named). Unreadable
    inputs are absent, and `problem` is called with the reason.
    """
    found: dict[str, dict[str, Any]] = {}
    samples: dict[str, list[Sample]] = {}
    for name in FILES:
        with _report_unreadable(name, problem):
            if path := options.get(name):
                found[name] = {"path": os.path.abspath(path), "sha256": hashes.of_file(path), "files": 1}
                if name == "eval_data_path" or not options.get("checkpoint"):
                    samples[name] = read_samples(path)

    def add(name: str, path: str, files: Mapping[str, Path]) -> None:
        if files:
            found[name] = {"path": os.path.abspath(path), "sha256": hashes.of_named(files), "files": len(files)}

    for name in FOLDERS:
        with _report_unreadable(name, problem):
            if path := options.get(name):
                add(name, path, {file.name: file for file in weight_files(path)})
    with _report_unreadable("frames", problem):
        if path := options.get("frames_dir"):
            add("frames", path, frame_files(path, (sample for group in samples.values() for sample in group)))
    with _report_unreadable("audio", problem):
        audio_dir = options.get("audio_dir")
        folders = {"train_data_path": audio_dir, "eval_data_path": options.get("eval_audio_dir") or audio_dir}
        if path := audio_dir or folders["eval_data_path"]:
            add("audio", path, audio_files(folders, samples))
    hashes.save()
    return found


@contextmanager
def _report_unreadable(name: str, problem: Callable[[str], None]) -> Iterator[None]:
    """Passes errors of unreadable files to `problem` instead of raising them."""
    try:
        yield
    except (OSError, SurgvqaError) as error:
        problem(f"{name}: not hashed: {error}")


def frame_files(frames_dir: str, samples: Iterable[Sample]) -> dict[str, Path]:
    """{name: file} of the samples' frames."""
    index = FrameIndex(frames_dir)
    return {frame: index.find(frame) for frame in dict.fromkeys(f for sample in samples for f in sample.frames)}


def audio_files(folders: Mapping[str, str | None], samples: Mapping[str, list[Sample]]) -> dict[str, Path]:
    """{folder and name: file} of the samples' recordings."""
    found = {}
    for name, group in samples.items():
        if folder := folders.get(name):
            index = AudioIndex(folder, group)
            for sample in group:
                file = index.find(sample)
                found[f"{name}/{file.relative_to(folder)}"] = file
    return found
