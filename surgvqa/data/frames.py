"""Frames: choosing them, decoding them, and turning one into the vision tower's patches.

Each step is a pure function of one frame, so that a cache can be laid between any two of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from PIL import Image

from surgvqa.errors import UsageError

if TYPE_CHECKING:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

T = TypeVar("T")


def select_frames(frames: Sequence[T], count: int) -> list[T]:
    """`count` of the frames, evenly spaced from the first on; all of them when there are no more than that."""
    if len(frames) <= count:
        return list(frames)
    return [frames[int(i * len(frames) / count)] for i in range(count)]


def largest_frame(frame_paths: Iterable[Sequence[str]]) -> tuple[int, int]:
    """Width and height in pixels of the largest of the clips' first frames, one of each folder, from their headers."""
    one_each = {os.path.dirname(paths[0]): paths[0] for paths in frame_paths}
    sizes = []
    for path in one_each.values():
        with Image.open(path) as file:
            sizes.append(file.size)
    return max(sizes, key=lambda size: size[0] * size[1])


def load_frame(path: str | os.PathLike[str], image_size: int) -> Image.Image:
    """The frame as RGB, its longest side at most `image_size` pixels (smaller frames stay as they are).

    Raises UsageError for a file that is missing, truncated or no image: a frame is never replaced by a black one.
    """
    try:
        with Image.open(os.fspath(path)) as file:
            if file.mode.startswith(("I", "F")):  # Pillow would make all above 255 of it white
                raise ValueError(f"mode {file.mode}: more than 8 bits a pixel; convert it to 8 bits")
            image = file.convert("RGB")
    except Exception as error:  # Pillow's plugins raise anything on broken files: OSError, SyntaxError, struct.error, …
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be decoded ({error})"
        raise UsageError(f"frame {os.fspath(path)} {reason}, expected a whole image file") from None
    image.thumbnail((image_size, image_size))  # Pillow's default filter, as the old script
    return image


def frame_patches(image: Image.Image, image_processor: Qwen2VLImageProcessorPil) -> tuple[np.ndarray, np.ndarray]:
    """(patches float32 [t·h·w, 3·2·14·14], grid int64 [3] = t, h, w in patches) of one RGB frame."""
    batch = image_processor(images=[image], return_tensors="np")
    return batch["pixel_values"], batch["image_grid_thw"][0]
