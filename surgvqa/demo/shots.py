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
    place: int = 0
    """What the wall looks like there, where lumen, lesion and tool are: twins share it."""

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


WAYS: tuple[tuple[tuple[str, str | None], ...], ...] = (
    (("still", "left"), ("still", "right")),
    (("still", "up"), ("still", "down")),
    (("still", "stable"),),
    (("still", None),),
    (("advancing", None), ("withdrawing", None)),
)
"""(how the scope travels, how the lesion moves): opposite ways stand together."""


def draw_shots(rng: np.random.Generator, video_id: str, per_group: int, twins: bool = True) -> list[Shot]:
    """Shots of one video, balanced in what is asked about them; `per_group` scales their number.

    Each attribute is dealt from its own balanced deck, so that none can be guessed from another. With `twins` opposite
    ways of moving are filmed at the same place, with the same light and tool: as the same film run backwards, so that
    nothing but the order of its frames tells which it is. Without, every shot has a place of its own.
    """
    places = [ways for ways in WAYS for _ in range(2 * per_group)]
    if not twins:
        places = [(way,) for ways in places for way in ways]
    count = len(places)

    def deck(values: Sequence[object]) -> list[object]:
        cards = [values[i % len(values)] for i in range(count)]
        return [cards[i] for i in rng.permutation(count)]

    lighting, tools, flush, dye = (
        deck(("WL", "WL", "NBI")),
        deck((None, "forceps", "catheter")),
        deck((False, True)),
        deck((True, False)),
    )
    shots = [
        dict(
            view="tunnel",
            travel=travel,
            lesion=lesion,
            lighting=lighting[place],
            tool=tools[place],
            flush=flush[place],
            dye=dye[place] and lighting[place] == "WL",
            place=place,
        )
        for place, ways in enumerate(places)
        for travel, lesion in ways
    ]
    for view in ("fluid", "close-up", "outside"):
        shots += [
            dict(view=view, lighting=("WL", "NBI")[i % 2] if view != "outside" else "WL", place=len(shots) + i)
            for i in range(3 * per_group)
        ]
    return [Shot(video_id, number, **shots[i]) for number, i in enumerate(rng.permutation(len(shots)))]
