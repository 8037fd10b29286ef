"""Encodes every frame and question of a run once, with the frozen encoders, into the feature cache.

Afterwards the encoders are moved off the GPU, and a step reads features instead of pixels and mels.
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
from surgvqa.data.audio import audio_features, load_audio, question_end_s
from surgvqa.data.dataset import ClipDataset, loaded
from surgvqa.data.feature_store import FeatureStore, encoder_fingerprint
from surgvqa.data.frames import frame_patches, load_frame
from surgvqa.data.processors import Processors
from surgvqa.errors import SurgvqaError
from surgvqa.machine.process import usable_cores
from surgvqa.model.audio_qwen2vl import AudioQwen2VLForConditionalGeneration
from surgvqa.model.vision import fused_elementwise
from surgvqa.runs.folder import Run
from surgvqa.runs.ranks import Ranks

PATCHES_AT_ONCE = 16_384
"""Vision patches per encoder call: 14 frames at 512 px. More is not faster on an H100 and takes more memory."""
QUESTIONS_AT_ONCE = 8
FRAMES_TO_COMPILE_FOR = 1_000
"""New frames from which on parts of the vision tower are compiled (an estimate)."""
ITEMS_PER_WORKER, DECODED_AHEAD = 16, 4
"""Frames or questions for which another worker process is worth its start; and how many of them each worker decodes
ahead of the encoder, at most."""
WRITTEN_BEHIND = 3
"""Maximum number of encoder calls whose features wait on the GPU to be written."""


def use_cache(
    model: AudioQwen2VLForConditionalGeneration,
    checkpoint: str | Path,
    datasets: Sequence[ClipDataset],
    options: CacheOptions,
    run: Run,
) -> bool:
    """Fills the feature cache and frees the encoders. Returns False when every step has to encode instead."""
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
    """The feature cache in `folder` for this model's encoders and processors."""
    weights = open_checkpoint(checkpoint)
    settings = {
        "vision": weights.config.get("vision_config"),
        "audio": model.config.audio_encoder_config,
        "image_processor": processors.image_processor.to_dict(),
        "feature_extractor": processors.feature_extractor.to_dict(),
        "audio_tokens": processors.num_audio_tokens,
        "notes": "question_end_s",  # invalidates entries without it
        "orientation": "exif",  # invalidates entries of frames that were not turned upright
    }
    return FeatureStore(folder, encoder_fingerprint(weights, model.dtype), settings)


def encoders_trainable(model: torch.nn.Module) -> bool:
    """Whether anything in an encoder is trainable, so that its outputs change and cannot be cached."""
    return any(p.requires_grad for n, p in model.named_parameters() if ".visual." in n or ".audio_encoder." in f".{n}")


def fill_cache(
    model: AudioQwen2VLForConditionalGeneration,
    datasets: Sequence[ClipDataset],
    store: FeatureStore,
    capacity_bytes: int,
    run: Run,
) -> bool:
    """Encodes what is missing and makes the datasets use the cache. Returns False, with a warning, if it does not fit.

    Entries that a killed run wrote are reused. Each of several ranks of a machine encodes a part.
    """
    run.phase("encode", "frames and questions, once for all epochs")
    ranks = run.ranks
    frames = {store.frame_key(p, d.image_size): (p, d) for d in datasets for clip in d.frame_paths for p in clip}
    sounds = {store.audio_key(p): (p, d) for d in datasets for p in d.audio_paths if p}
    needed = _size(model, _missing(frames, store), _missing(sounds, store))
    fits = not ranks.leads or store.make_room(needed, capacity_bytes, {*frames, *sounds})
    if not all(ranks.share(fits, "room in the cache")):
        run.warning(
            f"the feature cache would need {needed / 1e9:.1f} GB more and may hold {capacity_bytes / 1e9:g} GB "
            "(--feature_cache_gb): encoding in every step instead"
        )
        return False
    store.hold()
    # Looked up only now, because until `hold` another job could evict some.
    new_frames, new_sounds = (_missing(_rank_part(found, ranks), store) for found in (frames, sounds))
    for key in (*(frames.keys() - new_frames.keys()), *(sounds.keys() - new_sounds.keys())):
        with contextlib.suppress(OSError):  # the file is another user's
            os.utime(store.path(key))  # marks it as used, so that it is evicted last
    done, total = 0, len(new_frames) + len(new_sounds)
    processors = datasets[0].processors
    # Both start decoding now, because the worker processes take seconds to import the audio library.
    shown = [(path, dataset.image_size) for path, dataset in new_frames.values()]
    heard = [path for path, _ in new_sounds.values()]
    decoded_frames = _decode_ahead(_Frames(shown, processors, model.dtype), model.device)
    decoded_sounds = _decode_ahead(_Sounds(heard, processors, model.dtype), model.device)
    worth_compiling = model.device.type == "cuda" and len(new_frames) >= FRAMES_TO_COMPILE_FOR
    fused = fused_elementwise(model.model.visual) if worth_compiling else contextlib.nullcontext()
    with _all_ranks_or_none(ranks), torch.no_grad(), fused:
        frames_encoded = _encoded_frames(model, new_frames, decoded_frames)
        sounds_encoded = _encoded_sounds(model, new_sounds, decoded_sounds)
        for count in _write_behind(chain(frames_encoded, sounds_encoded), store):
            done += count
            run.progress("encode", done, total, "frames and questions")
    of_ranks = ranks.share(total, "encoded")
    total = sum(of_ranks[rank] for rank in ranks.beside)
    run.emit("phase", name="encoded", text=f"{total} encoded, {len(frames) + len(sounds) - total} found in the cache",
             encoded=total, reused=len(frames) + len(sounds) - total, folder=str(store.folder))  # fmt: skip
    for dataset in datasets:
        dataset.store = store
    return True


@contextlib.contextmanager
def _all_ranks_or_none(ranks: Ranks) -> Iterator[None]:
    """Waits at the end of the block until all ranks are there. An error on one of them is raised on all."""
    own_error: Exception | None = None
    try:
        yield
    except (torch.OutOfMemoryError, SurgvqaError) as error:
        own_error = error
    own_failure = (
        {"text": str(own_error), "memory": isinstance(own_error, torch.OutOfMemoryError)} if own_error else None
    )
    failures = {rank: found for rank, found in enumerate(ranks.share(own_failure, "encode")) if found}
    if own_error:
        raise own_error
    for rank, found in failures.items():
        raise (torch.OutOfMemoryError if found["memory"] else SurgvqaError)(ranks.name(rank) + found["text"])


def release_encoders(model: AudioQwen2VLForConditionalGeneration) -> None:
    """Takes both encoders off the GPU.

    Frozen weights become memory maps of the checkpoint's files, which takes no time or memory, and `.to` can read them
    again from there. Copying them to the host took 2.5 s.
    """
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
        encoder.to("cpu")  # parameters that are not in the files
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def encode_again(
    model: AudioQwen2VLForConditionalGeneration,
    datasets: Sequence[ClipDataset],
    options: CacheOptions,
    run: Run,
) -> None:
    """Moves the encoders back to the GPU to encode new frames, after datasets with a cache have changed their settings.

    If the new frames do not fit into the cache, the encoders stay and run in every step.
    """
    store = datasets[0].store
    if store is None:
        return
    for encoder in (model.model.visual, model.audio_encoder):
        encoder.to(model.lm_head.weight.device)
    model.eval()  # the next step or evaluation sets its own mode
    store.release()  # frames that are no longer shown may make room
    run.ranks.share(None, "cache released")
    if fill_cache(model, datasets, store, int(options.feature_cache_gb * 1e9), run):
        release_encoders(model)
        return
    for dataset in datasets:
        dataset.store = None


class _Frames(Dataset):
    """For worker processes: (patches in the encoder's dtype, grid) of each frame."""

    def __init__(self, items: list[tuple[str, int]], processors: Processors, dtype: torch.dtype):
        self.items, self.processors, self.dtype = items, processors, dtype

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        path, image_size = self.items[index]
        patches, grid = frame_patches(load_frame(path, image_size), self.processors.image_processor)
        return torch.as_tensor(patches).to(self.dtype), torch.as_tensor(grid)


class _Sounds(Dataset):
    """For worker processes: (spectrogram in the encoder's dtype, end of the question in seconds) of each recording."""

    def __init__(self, items: list[str], processors: Processors, dtype: torch.dtype):
        self.items, self.processors, self.dtype = items, processors, dtype

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, float]:
        sound = load_audio(self.items[index])
        mel = audio_features(sound, self.processors.feature_extractor, self.processors.num_audio_tokens)
        return torch.as_tensor(mel).to(self.dtype), question_end_s(sound)


def _decode_ahead(items: _Frames | _Sounds, device: torch.device) -> Iterator[Any]:
    """The items in order. All cores but one start decoding at once; a few items need no extra process."""
    workers = min(usable_cores() - 1, len(items) // ITEMS_PER_WORKER)
    loader = DataLoader(
        items,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=DECODED_AHEAD if workers else None,
        pin_memory=device.type == "cuda",
    )
    return loaded(iter(loader))


Entry = tuple[str, torch.Tensor, dict[str, str]]
"""A cache entry: key, features, notes."""


def _encoded_frames(model: Any, keys: Iterable[str], decoded: Iterator[Any]) -> Iterator[list[Entry]]:
    """Yields the cache entries of each encoder call on the decoded (patches, grid)."""
    for frames in _call_batches(zip(keys, decoded)):
        names, pixels, grids = zip(*frames)
        patches = torch.cat([part.to(model.device, non_blocking=True) for part in pixels])
        features = model.encode_images(patches, torch.stack(grids))
        tokens = [int(grid.prod()) // model.config.vision_config.spatial_merge_size**2 for grid in grids]
        notes = [{"grid": " ".join(map(str, grid.tolist()))} for grid in grids]
        yield list(zip(names, features.split(tokens), notes))


def _call_batches(decoded: Iterable[tuple[str, Any]]) -> Iterator[list[tuple[str, torch.Tensor, torch.Tensor]]]:
    """Groups the decoded frames into encoder calls: lists of (key, patches, grid)."""
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
    """Yields the cache entries of each encoder call on the decoded spectrograms."""
    named = zip(keys, decoded)
    while part := list(islice(named, QUESTIONS_AT_ONCE)):
        states = model.encode_audio(torch.stack([mel.to(model.device, non_blocking=True) for _, (mel, _) in part]))
        yield [(key, state, {"question_end_s": repr(end_s)}) for (key, (_, end_s)), state in zip(part, states)]


def _write_behind(encoded: Iterable[list[Entry]], store: FeatureStore) -> Iterator[int]:
    """Writes entries while the encoder continues; yields how many it wrote."""
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


def _rank_part(entries: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """The entries that this rank encodes; each machine has its own cache.

    Only the key decides, so ranks need not know what others have written.
    """
    mine, count = ranks.beside.index(ranks.rank), len(ranks.beside)
    return {key: item for key, item in entries.items() if int(key, 16) % count == mine}


def _missing(entries: dict[str, Any], store: FeatureStore) -> dict[str, Any]:
    return {key: item for key, item in entries.items() if key not in store}


def _size(model: Any, frames: dict[str, tuple[str, ClipDataset]], sounds: dict[str, Any]) -> int:
    """Bytes that the missing entries will take. Each frame counts as the largest square of its size."""
    itemsize = torch.empty(0, dtype=model.dtype).element_size()
    vision = model.config.vision_config
    token_px = vision.patch_size * vision.spatial_merge_size
    frame_tokens = sum((-(-d.image_size // token_px)) ** 2 for _, d in frames.values())
    audio = model.audio_encoder.config
    audio_values = len(sounds) * audio.max_source_positions * audio.d_model
    return itemsize * (frame_tokens * model.config.text_config.hidden_size + audio_values)
