"""Whether a sample's frames support its label, judged by the lesion's hand-drawn boxes in them.

Boxes can answer two question types of REAL-Colon-VQA. For `lesion_motion_direction` we use the lesion's displacement
between the first and the last of the sample's frames that show it, in shares of the frame's width and height:

- A direction is **supported** by a displacement of at least `drift` in it, "stable" by a smaller one in all directions.
- It is **contradicted** by a displacement of at least `drift` in other directions only, and "stable" by any such one.
- Otherwise it is **not shown**: the lesion hardly moves in these frames, or fewer than two of them show it.

For `lesion_screen_position` we use the lesion's mean position: its quadrant supports or contradicts the label. Within
`EDGE` of a middle line, both sides are supported.

How the dataset's labels were made is not published. So `drift` is an option, and a contradiction is a reason to look at
the data, not a verdict on it. If there are several lesions, the one in most of the sample's frames counts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from surgvqa.data.boxes import Boxes, Centre
from surgvqa.data.samples import Sample

MOTION, POSITION = "lesion_motion_direction", "lesion_screen_position"
SUPPORTED, CONTRADICTED, NOT_SHOWN = VERDICTS = ("supported", "contradicted", "not_shown")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Directions in shares of the frame, whose origin is the upper left corner."""
STABLE = "stable"
EDGE = 0.02
WIDER = range(2, 9)
"""How much longer than the sample's a stretch of video may be in the search for the motion that the label names."""


@dataclass(frozen=True)
class Visibility:
    """Whether the frames of one sample support its label."""

    place: str
    question_type: str
    label: str
    verdict: str
    shows: str
    """What the frames show, as a message."""
    window: tuple[int, int] | None = None
    """First and last frame number of a stretch of video around the sample in which the lesion moves as labelled."""


def visibility(samples: Iterable[Sample], boxes: Boxes, drift: float) -> list[Visibility | None]:
    """Each sample's visibility; None for an unknown label or a question type that boxes cannot answer.

    `drift`: smallest displacement that counts as movement, as a share of the frame's width or height.
    """
    return [_judge(sample, boxes, drift) for sample in samples]


def summary(found: Sequence[Visibility | None]) -> dict[str, Any]:
    """Counts of each verdict in total and by question type, and the unsupported samples."""
    judged = [one for one in found if one]
    types = sorted({one.question_type for one in judged})
    return {
        "samples": len(judged),
        **_counts(judged),
        "by_type": {kind: _counts([one for one in judged if one.question_type == kind]) for kind in types},
        "list": [asdict(one) for one in judged if one.verdict != SUPPORTED],
    }


def _counts(judged: Iterable[Visibility]) -> dict[str, int]:
    counts = Counter(one.verdict for one in judged)
    return {verdict: counts[verdict] for verdict in VERDICTS}


def _judge(sample: Sample, boxes: Boxes, drift: float) -> Visibility | None:
    moves = sample.question_type == MOTION and sample.label in (*DIRECTIONS, STABLE)
    quadrant = _quadrant(sample.label) if sample.question_type == POSITION else None
    if not moves and quadrant is None:
        return None
    seen = _path(sample.frames, boxes)
    window = None
    if quadrant is not None:
        verdict, shows = _judge_position(quadrant, seen)
    else:
        verdict, shows = _judge_motion(sample.label, seen, drift)
        if verdict != SUPPORTED and sample.label in DIRECTIONS:
            window = _window(sample, boxes, drift)
    return Visibility(sample.place, sample.question_type, sample.label, verdict, shows, window)


def _path(frames: Sequence[str], boxes: Boxes) -> list[Centre]:
    """The positions of the lesion that most of the frames show, in those frames."""
    by_frame = [boxes.lesions(frame) or {} for frame in frames]
    shown = Counter(lesion for lesions in by_frame for lesion in lesions)
    if not shown:
        return []
    name = shown.most_common(1)[0][0]
    return [lesions[name] for lesions in by_frame if name in lesions]


def _judge_motion(label: str, seen: Sequence[Centre], drift: float) -> tuple[str, str]:
    if len(seen) < 2:
        return NOT_SHOWN, "the lesion in no frame" if not seen else "the lesion in one frame only"
    dx, dy = seen[-1].x - seen[0].x, seen[-1].y - seen[0].y
    shows = f"the lesion moves {_displacement(dx, 'left', 'right')} and {_displacement(dy, 'up', 'down')}"
    still = max(abs(dx), abs(dy)) < drift
    if label == STABLE:
        return (SUPPORTED if still else CONTRADICTED), shows
    towards = DIRECTIONS[label]
    if dx * towards[0] + dy * towards[1] >= drift:
        return SUPPORTED, shows
    return (NOT_SHOWN if still else CONTRADICTED), shows


def _displacement(by: float, negative: str, positive: str) -> str:
    return f"{100 * abs(by):.1f} % {positive if by >= 0 else negative}"


def _quadrant(label: str) -> tuple[int, int] | None:
    """(-1 for left or 1 for right, -1 for upper or 1 for lower); None for a label that is not a quadrant."""
    words = set(re.split(r"[\s_-]+", label))
    x = [side for side, name in ((-1, "left"), (1, "right")) if name in words]
    y = [side for side, names in ((-1, {"upper", "top"}), (1, {"lower", "bottom"})) if names & words]
    return (x[0], y[0]) if len(x) == len(y) == 1 else None


def _judge_position(quadrant: tuple[int, int], seen: Sequence[Centre]) -> tuple[str, str]:
    if not seen:
        return NOT_SHOWN, "the lesion in no frame"
    x, y = sum(c.x for c in seen) / len(seen), sum(c.y for c in seen) / len(seen)
    shows = f"the lesion at {100 * x:.0f} % from the left and {100 * y:.0f} % from the top"
    inside = all((at - 0.5) * side >= -EDGE for at, side in zip((x, y), quadrant))
    return (SUPPORTED if inside else CONTRADICTED), shows


def _window(sample: Sample, boxes: Boxes, drift: float) -> tuple[int, int] | None:
    """The shortest stretch of video around the sample in which the lesion moves as labelled, with as many frames."""
    numbers = sample.frame_numbers
    if not numbers or len(numbers) < 2:
        return None
    first, last = min(numbers), max(numbers)
    for times in WIDER:
        more = (last - first) * (times - 1) // 2
        begin, end = max(first - more, 0), last + more
        step = (end - begin) / (len(numbers) - 1)
        video = sample.frames[0].rpartition("_")[0]
        frames = [f"{video}_{round(begin + step * i)}" for i in range(len(numbers))]
        if _judge_motion(sample.label, _path(frames, boxes), drift)[0] == SUPPORTED:
            return begin, end
    return None
