"""Measures the data path on the CPU: the cost of each part of decoding a sample, the effect of worker processes, and
that of the feature cache.

    python benchmarks/data_path.py --data demo [--samples 24] [--workers 1,2]

Uses frames of 1240x1080 (the demo's, enlarged, with noise) at 512 px, 8 per sample, and the demo's spoken questions
with 30 s spectrograms. One thread per process. Prints samples/s per core.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import engine
import torch
from torch.utils.data import DataLoader

from surgvqa.config.options import DataOptions
from surgvqa.data.audio import audio_features, load_audio
from surgvqa.data.collate import Collator
from surgvqa.data.dataset import ClipDataset, ids_and_labels
from surgvqa.data.feature_store import FeatureStore
from surgvqa.data.frames import frame_patches, load_frame
from surgvqa.data.processors import load_processors
from surgvqa.data.samples import read_samples
from surgvqa.machine.process import usable_cores

HIDDEN, AUDIO_HIDDEN = 3584, 1280
"""Widths of cached image and audio features of the real model."""


def seconds(work: Callable[[Any], Any], items: Iterable[Any], rounds: int = 2) -> float:
    """Seconds of the fastest round over all the items."""
    items, taken = list(items), []
    for _ in range(rounds):
        began = time.perf_counter()
        for item in items:
            work(item)
        taken.append(time.perf_counter() - began)
    return min(taken)


def real_audio(processors: Any) -> Any:
    """The processors with the real encoder's spectrograms: 128 mels, 1500 positions."""
    from transformers import WhisperFeatureExtractor

    processors.feature_extractor = WhisperFeatureExtractor(feature_size=128)
    processors.num_audio_tokens = 1500
    return processors


def filled(data: ClipDataset, folder: Path) -> FeatureStore:
    """A cache for the samples with features of the real model's sizes."""
    store = FeatureStore(folder, "benchmark", {})
    for clip, sound in zip(data.frame_paths, data.audio_paths):
        for path in clip:
            _, grid = frame_patches(load_frame(path, data.image_size), data.processors.image_processor)
            features = torch.randn(int(grid.prod()) // 4, HIDDEN).bfloat16()
            store.put(store.frame_key(path, data.image_size), features, grid=" ".join(str(int(n)) for n in grid))
        store.put(store.audio_key(sound), torch.randn(1500, AUDIO_HIDDEN).bfloat16())
    store.ram_bytes = 0  # reads from the disk, as in a run whose features do not fit into memory
    return store


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--workers", default="1,2", help="numbers of worker processes")
    given = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = next(p for p in (given.data / "merged", given.data / "stage1") if (p / "config.json").is_file())
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        engine.write_data(work, given.data, given.samples, (1240, 1080))
        data = ClipDataset(
            read_samples(work / "samples.jsonl"),
            work / "frames",
            given.data / "audio",
            real_audio(load_processors(checkpoint)),
            DataOptions(),
        )
        processors, count = data.processors, len(data)
        frames = [path for clip in data.frame_paths for path in clip]
        load_audio(data.audio_paths[0])  # imports
        images = [load_frame(path, 512) for path in frames]
        sounds = [load_audio(path) for path in data.audio_paths]
        grids = [[frame_patches(image, processors.image_processor)[1] for image in images[:8]]] * count
        words = {"input_mode": "audio_only", "question": "", "answer": "Yes, it is visible."}
        extractor = processors.feature_extractor
        parts = {
            "8 frames: decode, shrink": seconds(lambda path: load_frame(path, 512), frames),
            "8 frames: patches": seconds(lambda image: frame_patches(image, processors.image_processor), images),
            "question: decode": seconds(load_audio, data.audio_paths),
            "question: mel": seconds(lambda sound: audio_features(sound, extractor, 1500), sounds),
            "prompt and labels": seconds(lambda grid: ids_and_labels(processors, grid, **words), grids),
            "all, as in training without a cache": seconds(data.__getitem__, range(count)),
        }
        data.store = store = filled(data, work / "cache")
        parts["all, from the feature cache on disk"] = seconds(data.__getitem__, range(count))
        for name, taken in parts.items():
            print(f"{name:38} {1000 * taken / count:8.1f} ms a sample {count / taken:9.2f} samples/s a core")
        for name, data.store in (("decoding", None), ("cached", store)):
            for workers in (int(n) for n in given.workers.split(",")):
                loader = DataLoader(data, 1, collate_fn=Collator(processors), num_workers=workers, prefetch_factor=4)
                began = time.perf_counter()
                first = None
                for _ in loader:
                    first = first or time.perf_counter()
                taken = time.perf_counter() - first
                print(f"{name}, {workers} workers of {usable_cores()} cores: {(count - 1) / taken:.2f} samples/s after "
                      f"the first ({first - began:.2f} s)")  # fmt: skip


if __name__ == "__main__":
    main()
