"""The size of a sample in the model: patches and tokens of its clip, question and answer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from surgvqa.config.options import DataOptions
from surgvqa.data.audio_tokens import tokens_to
from surgvqa.model.sizes import Sizes

FRAME_SIZE = (1240, 1080)
"""Width and height of a frame of REAL-Colon-VQA, in pixels."""
MIN_PIXELS, MAX_PIXELS = 56 * 56, 14 * 14 * 4 * 1280
"""Bounds of a frame's area after resizing in Qwen2-VL's image processor, in pixels."""
QUESTION_S = 2.7
"""Seconds of a spoken question of REAL-Colon-VQA with eight words: 160 audio tokens with the default margin."""
PROMPT_TOKENS = 50
"""Text tokens of a prompt (data/prompt.py) in the author's vocabulary, without frames, audio and question."""
QUESTION_TOKENS = 20
"""Tokens of a written question: ten words and `User Question:`."""
ANSWER_TOKENS = 16
"""REAL-Colon-VQA's longest answer has nine words, which is about 16 tokens with punctuation and end of turn."""


def thumbnail_size(width: int, height: int, longest: int) -> tuple[int, int]:
    """(width, height) after Pillow's Image.thumbnail((longest, longest)), which keeps the aspect ratio."""
    if longest >= width and longest >= height:
        return width, height
    aspect = width / height

    def nearest(value: float, distance: Any) -> int:
        return max(min(math.floor(value), math.ceil(value), key=distance), 1)

    if aspect <= 1:
        return nearest(longest * aspect, lambda n: abs(aspect - n / longest)), longest
    return longest, nearest(longest / aspect, lambda n: 0 if n == 0 else abs(aspect - longest / n))


def patch_grid(width: int, height: int, sizes: Sizes) -> tuple[int, int]:
    """(rows, columns) of a frame's patches after Qwen2-VL's smart_resize: multiples of patch × merge, bounded area."""
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
    """The size of one sample in the model."""

    frames: int
    grid: tuple[int, int]
    """(rows, columns) of a frame's patches."""
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


def clip_of(
    sizes: Sizes,
    options: DataOptions,
    frame_size: tuple[int, int] = FRAME_SIZE,
    question_s: float = QUESTION_S,
) -> Clip:
    """The size, under `options`, of a sample with frames of `frame_size` (width, height) pixels.

    Its spoken question takes `question_s` seconds.
    """
    rows, columns = patch_grid(*thumbnail_size(*frame_size, options.image_size), sizes)
    written = 0 if options.input_mode == "audio_only" else QUESTION_TOKENS
    spoken = tokens_to(question_s, sizes.max_source_positions, options.audio_span, options.audio_margin_s)
    return Clip(
        frames=options.num_frames,
        grid=(rows, columns),
        image_tokens=options.num_frames * rows * columns // sizes.spatial_merge_size**2,
        audio_tokens=0 if options.input_mode == "text_only" else spoken,
        text_tokens=PROMPT_TOKENS + 2 * options.num_frames + written,
        answer_tokens=ANSWER_TOKENS,
    )
