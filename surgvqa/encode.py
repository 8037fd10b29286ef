"""The frozen encoders' own phase: every frame and question of a run, encoded once, into the feature cache.

Afterwards nothing needs the encoders: they leave the GPU, and a step reads features instead of pixels and mels.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from surgvqa.checkpoint import open_checkpoint, usable_cores
from surgvqa.config import CacheOptions
from surgvqa.data.audio import audio_features, load_audio
from surgvqa.data.dataset import ClipDataset, loaded
from surgvqa.data.features import FeatureStore, encoder_fingerprint
from surgvqa.data.frames import frame_patches, load_frame
from surgvqa.data.processors import Processors
from surgvqa.model import AudioQwen2VLForConditionalGeneration
from surgvqa.runs import Run

PATCHES_AT_ONCE = 16_384
"""Vision patches of one encoder call: 14 frames at 512 px. More is no faster on an H100 and takes more memory."""
QUESTIONS_AT_ONCE = 8
DECODED_A_WORKER = 16
"""Frames or questions that it takes at least to make another worker process worth its start."""


def use_cache(
    model: AudioQwen2VLForConditionalGeneration,
    checkpoint: str,
    datasets: Sequence[ClipDataset],
    options: CacheOptions,
    run: Run,
) -> bool:
    """Encodes all that the datasets show, once, and frees the encoders; False when every step has to encode instead."""
    if options.feature_cache == "off" or encoders_trainable(model):
        return False
    folder = Path(options.feature_cache_dir or run.folder.parents[1] / "cache")
    store = open_store(model, checkpoint, datasets[0].processors, folder)
    if not fill_cache(model, datasets, store, int(options.feature_cache_gb * 1e9), run):
        return False
    release_encoders(model)
    return True


def open_store(
    model: AudioQwen2VLForConditionalGeneration, checkpoint: str, processors: Processors, folder: Path
) -> FeatureStore:
    """The feature cache in `folder`, for this model's encoders and processors."""
    settings = {
        "image_processor": processors.image_processor.to_dict(),
        "feature_extractor": processors.feature_extractor.to_dict(),
        "audio_tokens": processors.num_audio_tokens,
    }
    return FeatureStore(folder, encoder_fingerprint(open_checkpoint(checkpoint), model.dtype), settings)


def encoders_trainable(model: torch.nn.Module) -> bool:
    """Whether anything in an encoder learns: then its outputs change and cannot be kept."""
    return any(p.requires_grad for n, p in model.named_parameters() if ".visual." in n or ".audio_encoder." in f".{n}")


def fill_cache(
    model: AudioQwen2VLForConditionalGeneration,
    datasets: Sequence[ClipDataset],
    store: FeatureStore,
    capacity_bytes: int,
    run: Run,
) -> bool:
    """Encodes what is missing, and points the datasets at the cache. False (with a warning) when it does not fit.

    Takes up where a killed run left off: entries are there or not.
    """
    run.phase("encode", "frames and questions, once for all epochs")
    frames = {store.frame_key(p, d.image_size): (p, d) for d in datasets for clip in d.frame_paths for p in clip}
    sounds = {store.audio_key(p): (p, d) for d in datasets for p in d.audio_paths}
    new_frames = {k: v for k, v in frames.items() if k not in store}
    new_sounds = {k: v for k, v in sounds.items() if k not in store}
    needed = _size(model, new_frames, new_sounds)
    if not store.make_room(needed, capacity_bytes, {*frames, *sounds}):
        run.warning(
            f"the feature cache would need {needed / 1e9:.1f} GB more and may hold {capacity_bytes / 1e9:g} GB "
            "(--feature_cache_gb): encoding in every step instead"
        )
        return False
    store.hold()
    for key in (*(frames.keys() - new_frames.keys()), *(sounds.keys() - new_sounds.keys())):
        os.utime(store.path(key))  # used now: the last to be evicted
    done, total = 0, len(new_frames) + len(new_sounds)
    processors = datasets[0].processors
    # Both start decoding now: what reads sound takes seconds to import, in its worker processes.
    shown = [(path, dataset.image_size) for path, dataset in new_frames.values()]
    decoded_frames = _decoded(_Frames(shown, processors))
    decoded_sounds = _decoded(_Sounds([path for path, _ in new_sounds.values()], processors))
    with torch.no_grad():
        for encoded in (
            _encode_frames(model, zip(new_frames, decoded_frames), store),
            _encode_sounds(model, zip(new_sounds, decoded_sounds), store),
        ):
            for count in encoded:
                done += count
                run.progress("encode", done, total, "frames and questions")
    run.emit("phase", name="encoded", text=f"{total} encoded, {len(frames) + len(sounds) - total} found in the cache",
             encoded=total, reused=len(frames) + len(sounds) - total, folder=str(store.folder))  # fmt: skip
    for dataset in datasets:
        dataset.store = store
    return True


def release_encoders(model: AudioQwen2VLForConditionalGeneration) -> None:
    """Moves both encoders off the GPU."""
    model.model.visual.to("cpu")
    model.audio_encoder.to("cpu")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def encode_again(
    model: AudioQwen2VLForConditionalGeneration,
    datasets: Sequence[ClipDataset],
    options: CacheOptions,
    run: Run,
) -> None:
    """After datasets with a cache have changed what they show: the encoders come back to the GPU for the new frames.

    Where the new frames do not fit into the cache, the encoders stay and run in every step.
    """
    store = datasets[0].store
    if store is None:
        return
    for encoder in (model.model.visual, model.audio_encoder):
        encoder.to(model.lm_head.weight.device)
    model.eval()  # the next step or evaluation sets the mode that it needs
    store.release()  # frames that are no longer shown may make room
    if fill_cache(model, datasets, store, int(options.feature_cache_gb * 1e9), run):
        release_encoders(model)
        return
    for dataset in datasets:
        dataset.store = None


class _Frames(Dataset):
    """Decoded frames as patches and grid, for worker processes."""

    def __init__(self, items: list[tuple[str, int]], processors: Processors):
        self.items, self.processors = items, processors

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        path, image_size = self.items[index]
        return frame_patches(load_frame(path, image_size), self.processors.image_processor)


class _Sounds(Dataset):
    """Decoded questions as spectrograms, for worker processes."""

    def __init__(self, items: list[str], processors: Processors):
        self.items, self.processors = items, processors

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        sound = load_audio(self.items[index])
        return audio_features(sound, self.processors.feature_extractor, self.processors.num_audio_tokens)


def _decoded(items: _Frames | _Sounds) -> Iterator[Any]:
    """The items in order, decoded from now on by all cores but the one that encodes; a few are not worth a process."""
    workers = min(usable_cores() - 1, len(items) // DECODED_A_WORKER)
    loader = DataLoader(items, batch_size=None, num_workers=workers, prefetch_factor=8 if workers else None)
    return loaded(iter(loader))


Frame = tuple[str, torch.Tensor, torch.Tensor]
"""Key in the cache, patches, grid."""


def _encode_frames(model: Any, decoded: Iterable[tuple[str, Any]], store: FeatureStore) -> Iterator[int]:
    """Stores the features of (key, (patches, grid)) frames; yields how many it has just done.

    While the GPU encodes some, the ones before are written.
    """
    writing = None
    with ThreadPoolExecutor(1) as writer:
        for frames in _together(decoded):
            _, pixels, grids = zip(*frames)
            patches = torch.cat(pixels).to(model.device, model.dtype)
            features = model.encode_images(patches, torch.stack(grids).to(model.device))
            if writing:
                yield writing.result()
            writing = writer.submit(
                _write_frames, frames, features, model.config.vision_config.spatial_merge_size, store
            )
        if writing:
            yield writing.result()


def _together(decoded: Iterable[tuple[str, Any]]) -> Iterator[list[Frame]]:
    """The frames, as many at a time as one call of the encoder takes."""
    frames: list[Frame] = []
    patches = 0
    for key, (pixels, grid) in decoded:
        frames.append((key, torch.as_tensor(pixels), torch.as_tensor(grid)))
        patches += len(pixels)
        if patches + len(pixels) > PATCHES_AT_ONCE:
            yield frames
            frames, patches = [], 0
    if frames:
        yield frames


def _write_frames(frames: list[Frame], features: torch.Tensor, merge_size: int, store: FeatureStore) -> int:
    tokens = [int(grid.prod()) // merge_size**2 for _, _, grid in frames]
    for (key, _, grid), part in zip(frames, features.cpu().split(tokens)):
        store.put(key, part, grid=" ".join(map(str, grid.tolist())))
    return len(frames)


def _encode_sounds(model: Any, decoded: Iterator[tuple[str, Any]], store: FeatureStore) -> Iterator[int]:
    """Stores the encoder states of (key, spectrogram) questions; yields how many it has just done."""
    while part := list(islice(decoded, QUESTIONS_AT_ONCE)):
        keys, mels = zip(*part)
        states = model.encode_audio(torch.stack([torch.as_tensor(mel) for mel in mels]).to(model.device, model.dtype))
        for key, state in zip(keys, states.cpu()):
            store.put(key, state)
        yield len(part)


def _size(model: Any, frames: dict[str, tuple[str, ClipDataset]], sounds: dict[str, Any]) -> int:
    """Bytes that the missing entries will take; a frame is reckoned as the largest square of its size."""
    itemsize = torch.empty(0, dtype=model.dtype).element_size()
    vision = model.config.vision_config
    token_px = vision.patch_size * vision.spatial_merge_size
    frame_tokens = sum((-(-d.image_size // token_px)) ** 2 for _, d in frames.values())
    audio = model.audio_encoder.config
    audio_values = len(sounds) * audio.max_source_positions * audio.d_model
    return itemsize * (frame_tokens * model.config.text_config.hidden_size + audio_values)
