"""What the camera sees: shots and the clips cut from them.

A shot is a stretch of film in which nothing changes but what its motion changes. Its parameters are drawn first and
the pictures are drawn from them, so every label is true by construction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

CLIP_FRAMES = 8
CLIP_STRIDE = 4
"""Frames between the beginnings of two clips of one shot: neighbours share four frames, as in the real set."""
FRAME_STEP = 4
"""Video frames between two shown frames, as in the real set."""


@dataclass(frozen=True)
class Shot:
    """One shot of one video."""

    video_id: str
    number: int
    view: str
    """tunnel | fluid | close-up | outside"""
    lighting: str = "WL"
    """WL | NBI"""
    travel: str = "still"
    """advancing | withdrawing | still"""
    lesion: str | None = None
    """None, or how it moves over the screen: left | right | up | down | stable"""
    tool: str | None = None
    """None | forceps | catheter"""
    dye: bool = False
    flush: bool = False
    length: int = 12
    """Frames."""

    def frame_number(self, i: int) -> int:
        """Number in the video of the shot's i-th frame."""
        return 1000 + 211 * self.number + FRAME_STEP * i

    def frame_name(self, i: int) -> str:
        """Name of the i-th frame, as the dataset spells it."""
        return f"{self.video_id}_{self.frame_number(i)}"


@dataclass(frozen=True)
class Clip:
    """Eight frames of a shot."""

    shot: Shot
    start: int

    @property
    def frame_numbers(self) -> list[int]:
        return [self.shot.frame_number(self.start + i) for i in range(CLIP_FRAMES)]

    @property
    def frames(self) -> list[str]:
        return [self.shot.frame_name(self.start + i) for i in range(CLIP_FRAMES)]


def clips_of(shots: Sequence[Shot]) -> list[Clip]:
    """Every clip of every shot."""
    return [Clip(shot, start) for shot in shots for start in range(0, shot.length - CLIP_FRAMES + 1, CLIP_STRIDE)]


def draw_shots(rng: np.random.Generator, video_id: str, per_group: int) -> list[Shot]:
    """Shots of one video, balanced in what is asked about them; `per_group` scales their number.

    Each attribute is dealt from its own balanced deck, so that none can be guessed from another.
    """
    motions = (
        [("still", lesion) for lesion in ("left", "right", "up", "down", "stable") for _ in range(per_group)]
        + [("still", None)] * (2 * per_group)
        + [(travel, None) for travel in ("advancing", "withdrawing") for _ in range(2 * per_group)]
    )
    count = len(motions)

    def deck(values: Sequence[object]) -> list[object]:
        cards = [values[i % len(values)] for i in range(count)]
        return [cards[i] for i in rng.permutation(count)]

    lighting, tools, flush, dye = (
        deck(("WL", "WL", "NBI")),
        deck((None, "forceps", "catheter")),
        deck((False, True, False)),
        deck((True, False)),
    )
    shots = [
        dict(
            view="tunnel",
            travel=travel,
            lesion=lesion,
            lighting=lighting[i],
            tool=tools[i],
            flush=flush[i],
            dye=dye[i] and lighting[i] == "WL",
        )
        for i, (travel, lesion) in enumerate(motions)
    ]
    for view in ("fluid", "close-up", "outside"):
        shots += [
            dict(view=view, lighting=("WL", "NBI")[i % 2] if view != "outside" else "WL") for i in range(2 * per_group)
        ]
    return [Shot(video_id, number, **shots[i]) for number, i in enumerate(rng.permutation(len(shots)))]
