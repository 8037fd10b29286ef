"""The demo's question types: wordings, answers and the label that a shot has by construction.

Names, out-of-template wordings, labels and answers are the real question set's own wherever its lines show them; the
rest (a label that the known lines never have, how the lesion's motion is asked in training) is worded alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from surgvqa.demo.shots import Shot


@dataclass(frozen=True)
class QuestionType:
    """One question type of the dataset."""

    name: str
    in_template: tuple[str, ...]
    """What training samples speak: the real set's wording, and others that share its key words, so that a model which
    hears a few hundred questions in all can tell what matters in them; short and long ones, so that length tells
    nothing."""
    out_of_template: str
    """What evaluation samples speak: a wording that training never does (but where the real set has one for both)."""
    answers: dict[str, str]
    """short_answer -> answer."""
    label: Callable[[Shot], str | None]
    """The shot's true short_answer; None when the question makes no sense for it."""


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _inside(value: Callable[[Shot], str | None]) -> Callable[[Shot], str | None]:
    """Asked only where the colon's wall is in clear view."""
    return lambda shot: value(shot) if shot.view == "tunnel" else None


def _patient(value: Callable[[Shot], str | None]) -> Callable[[Shot], str | None]:
    """Asked only inside the patient."""
    return lambda shot: None if shot.view == "outside" else value(shot)


QUESTION_TYPES: tuple[QuestionType, ...] = (
    QuestionType(
        "lighting_mode",
        (
            "Which lighting mode is used in this sequence?",
            "What lighting mode is on in these frames?",
            "Which lighting illuminates the scene?",
            "What lighting mode illuminates the frames of this clip?",
        ),
        "What lighting modality illuminates this sequence?",
        {"NBI": "NBI light is on in this sequence.", "WL": "WL light is on in this sequence."},
        _inside(lambda shot: shot.lighting),
    ),
    QuestionType(
        "nbi_status",
        (
            "Is the NBI light on?",
            "Is this clip captured in NBI mode?",
            "Are the frames using NBI?",
            "Are the frames of this clip captured using NBI?",
        ),
        "Are these frames captured using NBI mode?",
        {"yes": "Yes, NBI light is on in these frames.", "no": "No, WL light is on instead."},
        _inside(lambda shot: _yes(shot.lighting == "NBI")),
    ),
    QuestionType(
        "blue_dye_presence",
        (
            "Is blue dye present on the mucosa?",
            "Is dye visible on the mucosal surface?",
            "Is there any contrast dye on it?",
            "Is contrast dye visible anywhere on the surface?",
        ),
        "Is contrast dye visible on the mucosal surface?",
        {"yes": "Yes, blue dye is visible on the mucosa.", "no": "No, no dye is visible on the mucosa."},
        # Dye is sprayed under white light; under NBI nobody would ask.
        _inside(lambda shot: _yes(shot.dye) if shot.lighting == "WL" else None),
    ),
    QuestionType(
        "fluid_occlusion_level",
        (
            "How severe is the fluid occlusion in this clip?",
            "How much fluid occlusion is there?",
            "How severely does fluid occlude the view?",
            "How severe is the occlusion by fluid?",
        ),
        "How severe is the fluid-based occlusion?",
        {
            "absent": "Fluid occlusion is absent and clean mucosa stays visible.",
            "complete": "Fluid occlusion completely obscures the view.",
        },
        lambda shot: {"tunnel": "absent", "fluid": "complete"}.get(shot.view),
    ),
    QuestionType(
        "occlusion_check",
        (
            "Is there a close-up occlusion blocking the view?",
            "Is the view blocked by a close-up obstruction?",
            "Does an obstruction block the view?",
            "Does a close-up occlusion block the field of view?",
        ),
        "Does a close-up obstruction block the field of view?",
        {
            "yes": "Yes, a close-up obstruction blocks the view.",
            "no": "No, clean mucosa stays visible without obstruction.",
        },
        lambda shot: {"tunnel": "no", "close-up": "yes"}.get(shot.view),
    ),
    QuestionType(
        "mucosa_visibility",
        (
            "Is clean mucosa visible in this sequence?",
            "Can you observe clean mucosa here?",
            "Do you clearly see clean mucosa?",
            "Can you observe clean mucosa in the frames of this clip?",
        ),
        "Can you clearly observe clean mucosa in these frames?",
        {"yes": "Yes, clean mucosa is visible across frames.", "no": "No, clean mucosa is not consistently visible."},
        _patient(lambda shot: _yes(shot.view == "tunnel")),
    ),
    QuestionType(
        "scope_outside",
        (
            "Is the scope outside the patient in this sequence?",
            "Is the scope positioned outside the body?",
            "Does the scope lie outside the patient?",
            "Is it outside the patient?",
        ),
        "Is the scope positioned outside the patient here?",
        {"yes": "Yes, the scope is outside the patient.", "no": "No, the scope stays within the patient."},
        lambda shot: _yes(shot.view == "outside"),
    ),
    QuestionType(
        "flush_action",
        (
            "Is the endoscopist flushing the scene?",
            "Is the endoscopist flushing?",
            "Is he flushing the scene in this clip?",
            "Is the endoscopist flushing the scene during this sequence?",
        ),
        "Is the endoscopist flushing the scene in these frames?",
        {"yes": "Yes, the endoscopist is flushing the scene.", "no": "No, there is no flushing observed."},
        _inside(lambda shot: _yes(shot.flush)),
    ),
    QuestionType(
        "tool_catheter_check",
        (
            "Is the visible tool a catheter?",
            "Is the tool on screen a catheter?",
            "Is the instrument in view a catheter?",
            "Is the instrument on the screen here a catheter?",
        ),
        "Is the instrument on screen a catheter?",
        {"yes": "Yes, the visible tool is a catheter.", "no": "No, the visible tool is not a catheter."},
        _inside(lambda shot: _yes(shot.tool == "catheter") if shot.tool else None),
    ),
    QuestionType(
        "scope_motion_type",
        (
            "Is the scope primarily advancing or withdrawing in this sequence?",
            "Is the scope mostly advancing or withdrawing?",
            "Is it advancing or withdrawing?",
        ),
        "Is the scope primarily advancing or withdrawing in this sequence?",
        {"advancing": "The scope is primarily advancing.", "withdrawing": "The scope is primarily withdrawing."},
        _inside(lambda shot: None if shot.travel == "still" else shot.travel),
    ),
    QuestionType(
        "lesion_motion_direction",
        (
            "In which direction does the lesion move in this sequence?",
            "In which direction does it drift?",
            "In what direction is the lesion moving?",
            "In which direction does the lesion drift in this clip?",
        ),
        "In which direction does the lesion drift over the frames?",
        {
            "left": "The lesion drifts toward the left side of the screen.",
            "right": "The lesion drifts toward the right side of the screen.",
            "up": "The lesion shifts upward across the frames.",
            "down": "The lesion shifts downward across the frames.",
            "stable": "The lesion stays stable without noticeable movement.",
        },
        _inside(lambda shot: shot.lesion),
    ),
)
