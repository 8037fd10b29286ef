"""Selects frames, decodes them, and turns each into the vision tower's patches.

Each step is a pure function of one frame, so a cache can be put between any two of them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from PIL import ExifTags, Image, ImageOps

from surgvqa.errors import UsageError

if TYPE_CHECKING:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

T = TypeVar("T")
MAX_ASPECT = 100
"""Ratio of the longest to the shortest side. Upstream's image processor raises at 200, after it has rounded sides."""
QUARTER_TURNS = (5, 6, 7, 8)
"""EXIF orientations that exchange width and height."""


def select_frames(frames: Sequence[T], count: int) -> list[T]:
    """`count` of the frames, evenly spaced from the first on; all of them if there are not more."""
    if len(frames) <= count:
        return list(frames)
    return [frames[int(i * len(frames) / count)] for i in range(count)]


def largest_frame(frame_paths: Iterable[Sequence[str]]) -> tuple[int, int]:
    """(width, height) in pixels of the largest frame. Reads the header of one clip's first frame per folder."""
    one_each = {os.path.dirname(paths[0]): paths[0] for paths in frame_paths}
    sizes = []
    for path in one_each.values():
        with _naming_errors(path), _open_image(path) as file:
            turned = file.getexif().get(ExifTags.Base.Orientation, 1) in QUARTER_TURNS
            sizes.append(file.size[::-1] if turned else file.size)
    return max(sizes, key=lambda size: size[0] * size[1])


@contextlib.contextmanager
def _naming_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns every error of Pillow (OSError, SyntaxError, struct.error, …) into a UsageError that names the file."""
    try:
        yield
    except Exception as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be decoded ({error})"
        raise UsageError(f"frame {os.fspath(path)} {reason}, expected a complete image file") from None


def _open_image(path: str | os.PathLike[str]) -> Image.Image:
    if os.path.lexists(path) and not os.path.isfile(path):  # reading a pipe may never end
        raise ValueError("not a regular file")
    return Image.open(os.fspath(path))


def load_frame(path: str | os.PathLike[str], image_size: int) -> Image.Image:
    """The frame as RGB, upright, with a longest side of at most `image_size` pixels; smaller frames are not enlarged.

    Applies the EXIF orientation. Raises UsageError for a file that is missing, truncated, not an image, or too long and
    thin for the vision tower; a frame is never replaced by a black one.
    """
    with _naming_errors(path), _open_image(path) as file:
        if file.mode.startswith(("I", "F")):  # Pillow would turn all values above 255 white
            raise ValueError(f"mode {file.mode}: more than 8 bits per channel; convert it to 8 bits")
        image = ImageOps.exif_transpose(file).convert("RGB")
    width, height = image.size
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UsageError(
            f"frame {os.fspath(path)} is {width}×{height} pixels, expected no side over {MAX_ASPECT} times the other"
        )
    image.thumbnail((image_size, image_size))  # with Pillow's default filter, as in the old script
    return image


def frame_patches(image: Image.Image, image_processor: Qwen2VLImageProcessorPil) -> tuple[np.ndarray, np.ndarray]:
    """(patches float32 [t·h·w, 3·2·14·14], grid int64 [3] = (t, h, w) in patches) of one RGB frame."""
    batch = image_processor(images=[image], return_tensors="np")
    return batch["pixel_values"], batch["image_grid_thw"][0]
