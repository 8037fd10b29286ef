"""Frames as half-blocks: two pixels a character, in any terminal with colours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from textual.content import Content

if TYPE_CHECKING:
    from PIL.Image import Image

LEAST, GAP = 16, 1
"""Columns of a frame, at least, and between two of them."""
KEPT = 160
"""Pixels of a thumbnail's longer side."""


def thumbnails(files: Sequence[Path]) -> list[Image]:
    """Small copies of the frames, upright; empty without Pillow. OSError for one that cannot be read."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        return []
    found = []
    for file in files:
        with Image.open(file) as image:
            image.draft("RGB", (2 * KEPT, 2 * KEPT))
            small = ImageOps.exif_transpose(image).convert("RGB")
            small.thumbnail((KEPT, KEPT))
            found.append(small)
    return found


def strip(images: Sequence[Image], width: int) -> Content:
    """As many of the frames side by side as fit, evenly chosen, `width` columns in all."""
    if not images:
        return Content("no frames to show")
    count = max(1, min(len(images), (width + GAP) // (LEAST + GAP)))
    columns = (width + GAP) // count - GAP
    shown = [images[int(i * len(images) / count)] for i in range(count)]
    rows = max(1, round(columns * shown[0].height / shown[0].width / 2))
    pixels = [image.resize((columns, 2 * rows)).tobytes() for image in shown]
    parts: list[tuple[str, str] | str] = []
    for row in range(rows):
        for number, data in enumerate(pixels):
            parts += [" " * GAP] if number else []
            for column in range(columns):
                above, below = (3 * ((2 * row + half) * columns + column) for half in (0, 1))
                parts.append(("▀", f"#{data[above : above + 3].hex()} on #{data[below : below + 3].hex()}"))
        parts += ["\n"] if row + 1 < rows else []
    return Content.assemble(*parts)
