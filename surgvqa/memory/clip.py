"""The size of a sample as the model sees it: patches and tokens of a clip, a question, an answer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from surgvqa.config.options import DataOptions
from surgvqa.model.sizes import Sizes

FRAME_SIZE = (1240, 1080)
"""Width and height of a frame of REAL-Colon-VQA in pixels."""
MIN_PIXELS, MAX_PIXELS = 56 * 56, 14 * 14 * 4 * 1280
"""Bounds of a frame's area after resizing: Qwen2-VL's image processor."""
PROMPT_TOKENS = 50
"""Text tokens of a prompt in data/prompt.py with the author's vocabulary, without frames, audio and question."""
QUESTION_TOKENS = 20
"""A written question (input_mode audio_text): ten words and `User Question:`."""
ANSWER_TOKENS = 16
"""The longest answer of REAL-Colon-VQA has nine words; with full stop, comma and end of turn about 16 tokens."""


def thumbnail_size(width: int, height: int, longest: int) -> tuple[int, int]:
    """Size that Pillow's Image.thumbnail((longest, longest)) gives: the aspect kept as well as whole pixels allow."""
    if longest >= width and longest >= height:
        return width, height
    aspect = width / height

    def nearest(value: float, distance: Any) -> int:
        return max(min(math.floor(value), math.ceil(value), key=distance), 1)

    if aspect <= 1:
        return nearest(longest * aspect, lambda n: abs(aspect - n / longest)), longest
    return longest, nearest(longest / aspect, lambda n: 0 if n == 0 else abs(aspect - longest / n))


def patch_grid(width: int, height: int, sizes: Sizes) -> tuple[int, int]:
    """(rows, columns) of patches of a frame: Qwen2-VL's smart_resize to multiples of patch × merge, area bounded."""
    factor = sizes.patch_size * sizes.spatial_merge_size
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rows * columns > MAX_PIXELS:
        shrink = math.sqrt(height * width / MAX_PIXELS)
        rows = max(factor, math.floor(height / shrink / factor) * factor)
        columns = max(factor, math.floor(width / shrink / factor) * factor)
    elif rows * columns < MIN_PIXELS:
        grow = math.sqrt(MIN_PIXELS / (height * width))
        rows = math.ceil(height * grow / factor) * factor
        columns = math.ceil(width * grow / factor) * factor
    return rows // sizes.patch_size, columns // sizes.patch_size


@dataclass(frozen=True)
class Clip:
    """One sample as the model sees it."""

    frames: int
    grid: tuple[int, int]
    """Patches of a frame: rows, columns."""
    image_tokens: int
    """Of all frames."""
    audio_tokens: int
    text_tokens: int
    answer_tokens: int

    @property
    def patches(self) -> int:
        return self.frames * self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """Length of the sequence."""
        return self.image_tokens + self.audio_tokens + self.text_tokens + self.answer_tokens


def clip_of(sizes: Sizes, options: DataOptions, frame_size: tuple[int, int] = FRAME_SIZE) -> Clip:
    """The sample that `options` make of a clip whose frames are `frame_size` (width, height) pixels."""
    rows, columns = patch_grid(*thumbnail_size(*frame_size, options.image_size), sizes)
    written = QUESTION_TOKENS if options.input_mode == "audio_text" else 0
    return Clip(
        frames=options.num_frames,
        grid=(rows, columns),
        image_tokens=options.num_frames * rows * columns // sizes.spatial_merge_size**2,
        audio_tokens=sizes.max_source_positions,
        text_tokens=PROMPT_TOKENS + 2 * options.num_frames + written,
        answer_tokens=ANSWER_TOKENS,
    )
