"""The frozen encoders' own phase: every frame and question of a run, encoded once, into the feature cache.

Afterwards nothing needs the encoders: they leave the GPU, and a step reads features instead of pixels and mels.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.utils.data import DataLoader, Dataset

from surgvqa.checkpoint.folder import open_checkpoint
from surgvqa.config.options import CacheOptions
from surgvqa.data.audio import audio_features, load_audio
from surgvqa.data.dataset import ClipDataset, loaded
from surgvqa.data.feature_store import FeatureStore, encoder_fingerprint
from surgvqa.data.frames import frame_patches, load_frame
from surgvqa.data.processors import Processors
from surgvqa.machine.process import usable_cores
from surgvqa.model.audio_qwen2vl import AudioQwen2VLForConditionalGeneration
from surgvqa.runs.folder import Run

PATCHES_AT_ONCE = 16_384
"""Vision patches of one encoder call: 14 frames at 512 px. More is no faster on an H100 and takes more memory."""
QUESTIONS_AT_ONCE = 8
DECODED_A_WORKER, DECODED_AHEAD = 16, 4
"""Frames or questions that it takes at least to make another worker process worth its start; and how many each worker
is ahead of the encoder, at most."""
WRITTEN_BEHIND = 3
"""Calls of an encoder whose features wait on the GPU to be written, at most."""


def use_cache(
    model: AudioQwen2VLForConditionalGeneration,
    checkpoint: str | Path,
    datasets: Sequence[ClipDataset],
    options: CacheOptions,
    run: Run,
) -> bool:
    """Encodes all that the datasets show, once, and frees the encoders; False when every step has to encode instead."""
    if options.feature_cache == "off" or encoders_trainable(model):
        return False
    folder = Path(options.feature_cache_dir or run.workspace / "cache")
    store = open_store(model, checkpoint, datasets[0].processors, folder)
    if not fill_cache(model, datasets, store, int(options.feature_cache_gb * 1e9), run):
        return False
    release_encoders(model)
    return True


def open_store(
    model: AudioQwen2VLForConditionalGeneration, checkpoint: str | Path, processors: Processors, folder: Path
) -> FeatureStore:
    """The feature cache in `folder`, for this model's encoders and processors."""
    weights = open_checkpoint(checkpoint)
    settings = {
        "vision": weights.config.get("vision_config"),
        "audio": model.config.audio_encoder_config,
        "image_processor": processors.image_processor.to_dict(),
        "feature_extractor": processors.feature_extractor.to_dict(),
        "audio_tokens": processors.num_audio_tokens,
        "orientation": "exif",  # entries of frames that were not turned upright are not taken
    }
    return FeatureStore(folder, encoder_fingerprint(weights, model.dtype), settings)


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
    needed = _size(model, _missing(frames, store), _missing(sounds, store))
    if not store.make_room(needed, capacity_bytes, {*frames, *sounds}):
        run.warning(
            f"the feature cache would need {needed / 1e9:.1f} GB more and may hold {capacity_bytes / 1e9:g} GB "
            "(--feature_cache_gb): encoding in every step instead"
        )
        return False
    store.hold()
    new_frames, new_sounds = _missing(frames, store), _missing(sounds, store)  # until now another job could evict some
    for key in (*(frames.keys() - new_frames.keys()), *(sounds.keys() - new_sounds.keys())):
        with contextlib.suppress(OSError):  # another user's
            os.utime(store.path(key))  # used now: the last to be evicted
    done, total = 0, len(new_frames) + len(new_sounds)
    processors = datasets[0].processors
    # Both start decoding now: what reads sound takes seconds to import, in its worker processes.
    shown = [(path, dataset.image_size) for path, dataset in new_frames.values()]
    heard = [path for path, _ in new_sounds.values()]
    decoded_frames = _decoded(_Frames(shown, processors, model.dtype), model.device)
    decoded_sounds = _decoded(_Sounds(heard, processors, model.dtype), model.device)
    with torch.no_grad():
        frames_encoded = _encoded_frames(model, new_frames, decoded_frames)
        sounds_encoded = _encoded_sounds(model, new_sounds, decoded_sounds)
        for count in _stored(chain(frames_encoded, sounds_encoded), store):
            done += count
            run.progress("encode", done, total, "frames and questions")
    run.emit("phase", name="encoded", text=f"{total} encoded, {len(frames) + len(sounds) - total} found in the cache",
             encoded=total, reused=len(frames) + len(sounds) - total, folder=str(store.folder))  # fmt: skip
    for dataset in datasets:
        dataset.store = store
    return True


def release_encoders(model: AudioQwen2VLForConditionalGeneration) -> None:
    """Takes both encoders off the GPU. Frozen weights are the checkpoint's: they point into its files, which takes no
    time and no memory, and from where `.to` fetches them again. Copying them to the host took 2.5 s."""
    tensors = open_checkpoint(str(model.name_or_path)).tensors
    files: dict[Path, Any] = {}
    encoders: tuple[tuple[str, Any], ...] = (("visual.", model.model.visual), ("audio_encoder.", model.audio_encoder))
    for prefix, encoder in encoders:
        for name, parameter in encoder.named_parameters():
            if info := tensors.get(prefix + name):
                if info.file not in files:
                    files[info.file] = safe_open(info.file, "pt")
                stored = files[info.file].get_tensor(info.name)
                if (stored.dtype, stored.shape) == (parameter.dtype, parameter.shape):
                    parameter.data = stored
        encoder.to("cpu")  # whatever is not in the files
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
    """Decoded frames as patches, in the encoder's dtype, and grid, for worker processes."""

    def __init__(self, items: list[tuple[str, int]], processors: Processors, dtype: torch.dtype):
        self.items, self.processors, self.dtype = items, processors, dtype

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        path, image_size = self.items[index]
        patches, grid = frame_patches(load_frame(path, image_size), self.processors.image_processor)
        return torch.as_tensor(patches).to(self.dtype), torch.as_tensor(grid)


class _Sounds(Dataset):
    """Decoded questions as spectrograms, in the encoder's dtype, for worker processes."""

    def __init__(self, items: list[str], processors: Processors, dtype: torch.dtype):
        self.items, self.processors, self.dtype = items, processors, dtype

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> torch.Tensor:
        sound = load_audio(self.items[index])
        mel = audio_features(sound, self.processors.feature_extractor, self.processors.num_audio_tokens)
        return torch.as_tensor(mel).to(self.dtype)


def _decoded(items: _Frames | _Sounds, device: torch.device) -> Iterator[Any]:
    """The items in order, decoded from now on by all cores but the one that encodes; a few are not worth a process."""
    workers = min(usable_cores() - 1, len(items) // DECODED_A_WORKER)
    loader = DataLoader(
        items,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=DECODED_AHEAD if workers else None,
        pin_memory=device.type == "cuda",
    )
    return loaded(iter(loader))


Entry = tuple[str, torch.Tensor, dict[str, str]]
"""Of the cache: key, features, notes."""


def _encoded_frames(model: Any, keys: Iterable[str], decoded: Iterator[Any]) -> Iterator[list[Entry]]:
    """Features of the decoded (patches, grid), as many at a time as one call of the encoder takes."""
    for frames in _together(zip(keys, decoded)):
        names, pixels, grids = zip(*frames)
        patches = torch.cat([part.to(model.device, non_blocking=True) for part in pixels])
        features = model.encode_images(patches, torch.stack(grids))
        tokens = [int(grid.prod()) // model.config.vision_config.spatial_merge_size**2 for grid in grids]
        notes = [{"grid": " ".join(map(str, grid.tolist()))} for grid in grids]
        yield list(zip(names, features.split(tokens), notes))


def _together(decoded: Iterable[tuple[str, Any]]) -> Iterator[list[tuple[str, torch.Tensor, torch.Tensor]]]:
    """(key, patches, grid) of the frames of one call."""
    frames: list[tuple[str, torch.Tensor, torch.Tensor]] = []
    patches = 0
    for key, (pixels, grid) in decoded:
        frames.append((key, pixels, grid))
        patches += len(pixels)
        if patches + len(pixels) > PATCHES_AT_ONCE:
            yield frames
            frames, patches = [], 0
    if frames:
        yield frames


def _encoded_sounds(model: Any, keys: Iterable[str], decoded: Iterator[Any]) -> Iterator[list[Entry]]:
    """Encoder states of the decoded spectrograms, some at a time."""
    named = zip(keys, decoded)
    while part := list(islice(named, QUESTIONS_AT_ONCE)):
        names, mels = zip(*part)
        states = model.encode_audio(torch.stack([mel.to(model.device, non_blocking=True) for mel in mels]))
        yield [(key, state, {}) for key, state in zip(names, states)]


def _stored(encoded: Iterable[list[Entry]], store: FeatureStore) -> Iterator[int]:
    """Writes the entries some calls of the encoder behind, so that it goes on meanwhile; yields how many it wrote."""
    writing: deque[Future[int]] = deque()
    with ThreadPoolExecutor(2) as writer:
        for entries in encoded:
            writing.append(writer.submit(_write, entries, store))
            if len(writing) > WRITTEN_BEHIND:
                yield writing.popleft().result()
        while writing:
            yield writing.popleft().result()


def _write(entries: list[Entry], store: FeatureStore) -> int:
    for key, features, notes in entries:
        store.put(key, features, **notes)
    return len(entries)


def _missing(entries: dict[str, Any], store: FeatureStore) -> dict[str, Any]:
    return {key: item for key, item in entries.items() if key not in store}


def _size(model: Any, frames: dict[str, tuple[str, ClipDataset]], sounds: dict[str, Any]) -> int:
    """Bytes that the missing entries will take; a frame is reckoned as the largest square of its size."""
    itemsize = torch.empty(0, dtype=model.dtype).element_size()
    vision = model.config.vision_config
    token_px = vision.patch_size * vision.spatial_merge_size
    frame_tokens = sum((-(-d.image_size // token_px)) ** 2 for _, d in frames.values())
    audio = model.audio_encoder.config
    audio_values = len(sounds) * audio.max_source_positions * audio.d_model
    return itemsize * (frame_tokens * model.config.text_config.hidden_size + audio_values)
