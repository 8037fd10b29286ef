"""Which sample lends what, and what the answers add up to. No model."""

from dataclasses import replace

import pytest

from surgvqa.data.draw import draw_evenly
from surgvqa.data.samples import Sample
from surgvqa.probe.conditions import CONDITIONS, Case, Pool, cases_of
from surgvqa.probe.summary import Answered, Types, conclude, condition_row

ANSWERS = {
    "tool": {"snare": "The tool is a snare.", "clip": "The tool is a clip."},
    "side": {"left": "It moves left.", "right": "It moves right."},
    "dye": {"yes": "Yes, there is dye.", "no": "No, there is no dye."},
    "flush": {"yes": "Yes, it is flushing.", "no": "No, nothing is flushed."},
}


def sample(number: int, kind: str, label: str, clip: int | None = None, question: str = "") -> Sample:
    place = 1000 * (number if clip is None else clip)
    return Sample(
        id=f"q{number}",
        video_id="v",
        frames=(f"v_{place}", f"v_{place + 1}"),
        question=question or f"About {kind}?",
        question_type=kind,
        answer=ANSWERS[kind][label],
        short_answer=label,
    )


@pytest.fixture(scope="module")
def pool():
    samples = [
        sample(0, "tool", "snare"),
        sample(1, "side", "left", clip=0),  # the same clip as 0: a natural pair
        sample(2, "tool", "clip"),
        sample(3, "side", "right"),
        sample(4, "dye", "yes"),
        sample(5, "flush", "no"),
        sample(6, "tool", "snare", question="Which tool?"),
        sample(7, "side", "left"),
    ]
    training = [sample(20, "dye", "no", question="Any dye?")]
    return Pool([*samples, *training], [0, 0, 2, 3, 4, 5, 6, 7])


def partner(condition: str, index: int, pool: Pool) -> Sample | None:
    cases = cases_of(condition, [index], pool, seed=0)
    return pool.samples[cases[0].partner] if cases else None


def test_another_question_is_best_one_about_the_same_clip(pool):
    assert partner("other_question", 0, pool).id == "q1" and partner("other_text", 1, pool).id == "q0"
    # else one whose labels are all others: never the other yes/no question
    assert {partner("other_question", 4, replace(pool, samples=pool.samples)).question_type} <= {"tool", "side"}


def test_the_same_question_and_other_words(pool):
    assert partner("same_question", 0, pool).id == "q2" and partner("same_question", 6, pool) is None
    assert partner("other_wording", 0, pool).id == "q6"
    assert partner("other_wording", 4, pool).id == "q20"  # the training's, where the file has no other
    assert partner("other_wording", 5, pool) is None


def test_another_clip_is_best_one_of_another_label_and_never_of_the_same_cluster(pool):
    assert partner("other_clip", 0, pool).id == "q2"
    assert partner("other_clip", 1, pool).id == "q3"
    assert partner("other_clip", 4, pool).video_id == "v"


def test_partners_stay_when_fewer_samples_are_probed(pool):
    every = cases_of("other_question", range(8), pool, seed=3)
    assert cases_of("other_question", [2], pool, seed=3) == [case for case in every if case.index == 2]
    assert cases_of("silence", [2], pool, seed=3) == [Case("silence", 2)]


def test_samples_are_drawn_in_turn_from_the_types_and_their_labels(pool):
    samples = [*pool.samples[:8], *(sample(30 + n, "tool", "snare") for n in range(20))]
    drawn = draw_evenly(samples, 4, seed=1)
    assert {samples[i].question_type for i in drawn} == set(ANSWERS) and drawn == sorted(drawn)
    assert {samples[i].label for i in draw_evenly(samples, 6, seed=1)} == {
        "snare",
        "clip",
        "left",
        "right",
        "yes",
        "no",
    }
    assert draw_evenly(samples, 99, seed=1) == draw_evenly(samples, None, seed=1) == list(range(28))


# --- what they add up to ----------------------------------------------------------------------------------------------


def rows_of(pool: Pool, answer, *conditions: str) -> dict:
    """The rows of a model that answers a case with answer(condition, its own sample, the one that stands in)."""
    types, rows = Types(pool.samples), {}
    for condition in conditions:
        answered = []
        for case in cases_of(condition, pool.evaluation, pool, seed=0):
            own = pool.samples[case.index]
            other = None if case.partner is None else pool.samples[case.partner]
            answered.append(Answered(case, answer(condition, own, other), answer("as it is", own, None)))
        rows[condition] = condition_row(answered, pool, types)
    return rows


ALL = [name for name in CONDITIONS if name != "other_wording"]


def listens(condition, own, other):
    return (other or own).answer if condition != "silence" else "What?"


def reads(condition, own, other):
    return other.answer if condition in ("other_text", "other_clip") else own.answer


def deaf_and_blind(condition, own, other):
    return own.answer


def test_a_model_that_listens_is_told_from_one_that_reads_and_one_that_does_neither(pool):
    verdicts, sentences = conclude(rows_of(pool, listens, *ALL))
    assert verdicts == {"sound": "follows", "writing": "follows", "frames": "looks", "order": "none"}
    assert sentences[0].startswith("sound: follows the spoken question in 100 % (at least ")
    assert "silence changes 100 %" in sentences[0]
    verdicts, sentences = conclude(rows_of(pool, reads, *ALL))
    assert (verdicts["sound"], verdicts["writing"]) == ("deaf", "follows")
    assert sentences[0].startswith("sound: deaf: 0 % (at most ")
    verdicts, sentences = conclude(rows_of(pool, deaf_and_blind, *ALL))
    assert verdicts == {"sound": "deaf", "writing": "unread", "frames": "blind", "order": "none"}
    assert len(sentences) == 4
    assert conclude(rows_of(pool, deaf_and_blind, "silence", "noise"))[0] == {"sound": "deaf"}
    assert conclude(rows_of(pool, listens, "silence"))[0] == {"sound": "hears"}
    assert conclude(rows_of(pool, deaf_and_blind, "speed")) == ({}, [])


def test_a_model_that_only_jumps_at_sounds_does_not_follow(pool):
    def jumps(condition, own, other):
        return "Well." if condition == "other_question" else own.answer

    verdicts, sentences = conclude(rows_of(pool, jumps, "other_question"))
    assert verdicts == {"sound": "reacts"} and "does not follow the spoken question" in sentences[0]


def test_the_figures_of_a_row(pool):
    row = rows_of(pool, listens, "other_question")["other_question"]
    assert row["samples"] == 8 and row["influence"] == 1.0 and row["swapped_type"] == 1.0 and row["own_type"] == 0.0
    assert row["influence_interval"] == [pytest.approx(1 - 1.96**2 / (7 + 1.96**2)), 1.0]  # seven clusters
    assert row["accuracy"] == 0.0 and row["difference"] == -1.0
    assert row["natural_pairs"] == 2 and row["natural_accuracy"] == 1.0
    assert row["by_type"]["tool"] == {"n": 3, "influence": 1.0, "accuracy": 0.0, "difference": -1.0}
    clip = rows_of(pool, reads, "other_clip")["other_clip"]
    assert clip["told"] == 6 and clip["swapped_label"] == 1.0  # dye and flush have one label here


def test_yes_alone_tells_no_yes_no_question_from_another(pool):
    types = Types(pool.samples)
    assert types.can_distinguish("tool", "dye") and types.can_distinguish("dye", "flush")
    assert types.follows("dye", "flush", "Yes, there is dye.") and not types.follows("dye", "flush", "Yes.")
    assert types.follows("tool", "dye", "a snare") and not types.follows("dye", "tool", "a snare")
