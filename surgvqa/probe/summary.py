"""Summarises the answers to altered samples: figures with intervals, and conclusions as sentences.

**Influence** is the share of answers whose text changes. **Accuracy** is label accuracy against the original sample's
label (evaluation/score.py); its **difference** is paired, sample by sample.

If another question or other frames are used, the answer itself shows what it follows:

- `swapped_type`: the share of answers that answer the other question and not the sample's own. An answer belongs to a
  question type if it is one of the type's reference answers or states one of its labels. Only pairs whose types can be
  distinguished in this way count (`told`): two yes/no questions by their reference answers, never by "yes".
- `swapped_label`: for clips with another label for the same question, the share of answers that state this label.

All intervals are clustered 95 % intervals (evaluation/interval.py). That formula gives no width if all answers are
equal, so a share of 0 or 1 has Wilson's bound with the number of clusters as the number of trials.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from surgvqa.data.samples import Sample
from surgvqa.evaluation.interval import Z, interval, paired_interval
from surgvqa.evaluation.score import LabelSet
from surgvqa.probe.conditions import Case, Pool

NEGLIGIBLE = 0.05
"""A smaller share counts as none; its interval is always given."""
MOST = 0.5
"""A share whose interval begins above this counts as the rule."""
TYPES_NAMED = 3


class Types:
    """The question types of a file with their labels and reference answers."""

    def __init__(self, samples: Sequence[Sample]):
        references: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for sample in samples:
            references[sample.question_type].append((sample.short_answer, sample.answer))
        self.labels = {kind: LabelSet(pairs) for kind, pairs in references.items()}
        self._sentences = {kind: {_plain(answer) for _, answer in pairs} for kind, pairs in references.items()}

    def states(self, kind: str, label: str, answer: str) -> bool:
        """Whether the answer states this label of the question type, and no other."""
        return self.labels[kind].stated(answer) == {label}

    def belongs(self, kind: str, answer: str) -> bool:
        """Whether this is an answer to a question of this type."""
        return _plain(answer) in self._sentences[kind] or len(self.labels[kind].stated(answer)) == 1

    def can_distinguish(self, one: str, other: str) -> bool:
        """Whether answers show which of the two types they belong to, by their labels or as whole sentences."""
        mine, theirs = self._sentences[one], self._sentences[other]
        by_label = not any(self.belongs(other, s) for s in mine) and not any(self.belongs(one, s) for s in theirs)
        return by_label or mine.isdisjoint(theirs)

    def follows(self, wanted: str, not_wanted: str, answer: str) -> bool:
        """Whether the answer belongs to `wanted` and not to `not_wanted`.

        For two yes/no questions, only a whole reference answer can show this.
        """
        sentence = _plain(answer)
        if sentence in self._sentences[wanted]:
            return sentence not in self._sentences[not_wanted]
        return self.belongs(wanted, answer) and not self.belongs(not_wanted, answer)


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold().rstrip(".")


@dataclass(frozen=True)
class Answered:
    """One case with its answer and the answer to the unaltered sample."""

    case: Case
    answer: str
    as_it_is: str


def condition_row(answered: Sequence[Answered], pool: Pool, types: Types) -> dict[str, Any]:
    """The figures of one condition (see this module's docstring); shares are 0..1."""
    samples = [pool.samples[a.case.index] for a in answered]
    clusters = [pool.clusters[a.case.index] for a in answered]
    changed = [_plain(a.answer) != _plain(a.as_it_is) for a in answered]
    right = [types.states(s.question_type, s.label, a.answer) for s, a in zip(samples, answered)]
    before = [types.states(s.question_type, s.label, a.as_it_is) for s, a in zip(samples, answered)]
    differences = [int(now) - int(then) for now, then in zip(right, before)]
    row = {
        "samples": len(answered),
        **_share("influence", changed, clusters),
        "accuracy": _mean(right),
        "difference": _mean(differences),
        "interval": paired_interval(differences, clusters),
        "by_type": _by_type(samples, changed, right, differences),
    }
    partners = [None if a.case.partner is None else pool.samples[a.case.partner] for a in answered]
    others = [(s, p, a, c) for s, p, a, c in zip(samples, partners, answered, clusters) if p is not None]
    condition = answered[0].case.condition
    if condition in ("other_question", "other_text"):
        clear_pairs = [o for o in others if types.can_distinguish(o[0].question_type, o[1].question_type)]
        row["told"] = len(clear_pairs)
        if clear_pairs:
            kinds = [(s.question_type, p.question_type, a.answer) for s, p, a, _ in clear_pairs]
            row |= _share("swapped_type", [types.follows(p, s, a) for s, p, a in kinds], [o[3] for o in clear_pairs])
            row |= _share("own_type", [types.follows(s, p, a) for s, p, a in kinds], [o[3] for o in clear_pairs])
        pairs = [o for o in others if o[0].clip == o[1].clip]
        row["natural_pairs"] = len(pairs)
        if pairs:  # the correct answer to the other question is known
            states_label = [types.states(p.question_type, p.label, a.answer) for _, p, a, _ in pairs]
            row |= _share("natural_accuracy", states_label, [o[3] for o in pairs])
    if condition == "other_clip":
        relabelled = [o for o in others if o[0].question_type == o[1].question_type and o[0].label != o[1].label]
        row["told"] = len(relabelled)
        if relabelled:
            states_label = [types.states(p.question_type, p.label, a.answer) for _, p, a, _ in relabelled]
            row |= _share("swapped_label", states_label, [o[3] for o in relabelled])
    return row


def _share(name: str, found: Sequence[bool], clusters: Sequence[int]) -> dict[str, Any]:
    """{`name`: share of True values in `found`, `name`_interval: its interval}."""
    mean, bound = _mean(found), Z * Z / (len(set(clusters)) + Z * Z)
    degenerate = {0.0: [0.0, bound], 1.0: [1 - bound, 1.0]}.get(mean)
    return {name: mean, f"{name}_interval": degenerate or interval(found, clusters)}


def _by_type(
    samples: Sequence[Sample], changed: Sequence[bool], right: Sequence[bool], differences: Sequence[int]
) -> dict[str, dict[str, Any]]:
    rows: dict[str, list[tuple[bool, bool, int]]] = defaultdict(list)
    for sample, new, correct, difference in zip(samples, changed, right, differences):
        rows[sample.question_type].append((new, correct, difference))
    return {
        kind: {
            "n": len(group),
            "influence": _mean([g[0] for g in group]),
            "accuracy": _mean([g[1] for g in group]),
            "difference": _mean([g[2] for g in group]),
        }
        for kind, group in sorted(rows.items())
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# --- conclusions ------------------------------------------------------------------------------------------------------

Rows = Mapping[str, Mapping[str, Any]]


def conclude(rows: Rows) -> tuple[dict[str, str], list[str]]:
    """({modality: verdict}, a sentence for each modality)."""
    verdicts, sentences = {}, []
    for modality, judge in (("sound", _sound), ("writing", _writing), ("frames", _frames), ("order", _order)):
        if found := judge(rows):
            verdicts[modality], text = found
            sentences.append(text)
    return verdicts, sentences


def _question(rows: Rows, swap: str, unheard: Sequence[str], verb: str) -> tuple[str, str] | None:
    """(verdict, text) on whether answers follow the other question, spoken or written; None without such a row."""
    row = rows.get(swap)
    if row is None:
        others = [name for name in unheard if name in rows]
        if not others:
            return None
        if all(rows[name]["influence"] < NEGLIGIBLE for name in others):
            return "none", f"no answer depends on it: {_list_of(rows, others)}"
        return "some", f"answers depend on it: {_list_of(rows, others)}"
    if row["influence"] < NEGLIGIBLE:
        return "none", f"{_percent(row, 'influence')} of the answers change when another question {verb}"
    if "swapped_type" not in row:
        return "some", (
            f"{_percent(row, 'influence')} of the answers change when another question {verb}; the answers of"
            " these question types cannot show which question they follow"
        )
    share = f"in {_percent(row, 'swapped_type')} of {row['told']} swaps"
    if row["swapped_type_interval"][0] > MOST:
        return "follows", share
    if row["swapped_type"] < NEGLIGIBLE:
        return "reacts", (
            f"{_percent(row, 'influence')} of the answers change when another question {verb}, but follow it {share}"
        )
    return "partly", share


def _sound(rows: Rows) -> tuple[str, str] | None:
    found = _question(rows, "other_question", ("silence", "noise"), "is spoken")
    if found is None:
        return None
    verdict, text = found
    without = [name for name in ("silence", "noise") if name in rows]
    more = f"; {_list_of(rows, without)}" if without and verdict != "none" else ""
    wording = {
        "follows": f"follows the spoken question {text}{more}",
        "partly": f"follows the spoken question only {text}{more}",
        "reacts": f"hears something but does not follow the spoken question: {text}{more}",
        "some": f"hears the sound: {text}",
        "none": f"deaf: {text}",
    }
    return {"none": "deaf", "some": "hears"}.get(verdict, verdict), f"sound: {wording[verdict]}"


def _writing(rows: Rows) -> tuple[str, str] | None:
    found = _question(rows, "other_text", (), "is written")
    if found is None:
        return None
    verdict, text = found
    wording = {
        "follows": f"follows the written question {text}",
        "partly": f"follows the written question only {text}",
        "reacts": f"does not follow the written question: {text}",
        "some": f"reads the question: {text}",
        "none": f"does not read the question: {text}",
    }
    return {"none": "unread", "some": "reads"}.get(verdict, verdict), f"writing: {wording[verdict]}"


def _frames(rows: Rows) -> tuple[str, str] | None:
    given = [name for name in ("black", "other_clip") if name in rows]
    if not given:
        return None
    if all(rows[name]["influence"] < NEGLIGIBLE for name in given):
        return "blind", f"frames: blind: {_list_of(rows, given)}"
    parts = []
    if "black" in rows:
        parts.append(f"black frames change {_percent(rows['black'], 'influence')} of the answers")
        parts.append(f"accuracy then is {_points(rows['black'])}")
    if "swapped_label" in rows.get("other_clip", {}):
        row = rows["other_clip"]
        parts.append(f"frames of a clip with another label bring that label in {_percent(row, 'swapped_label')}")
    elif "other_clip" in rows:
        parts.append(f"another clip's frames change {_percent(rows['other_clip'], 'influence')} of the answers")
    return "looks", f"frames: looks at them: {'; '.join(parts)}"


def _order(rows: Rows) -> tuple[str, str] | None:
    name = next((name for name in ("shuffled", "first_frame") if name in rows), None)
    if name is None:
        return None
    row = rows[name]
    done = "another order of the frames" if name == "shuffled" else "one frame repeated"
    high = row["interval"][1]
    cost = "accuracy falls measurably" if high < 0 else "no measurable effect on accuracy"
    text = f"frame order: {cost} ({done}: {_points(row)}); {_percent(row, 'influence')} of answers change"
    most = sorted(row["by_type"].items(), key=lambda item: -item[1]["influence"])
    named = [f"{kind} {100 * r['influence']:.0f} %" for kind, r in most[:TYPES_NAMED] if r["influence"] > 0]
    verdict = "none" if row["influence"] < NEGLIGIBLE else "matters" if high < 0 else "some"
    return verdict, text + (f", most in {', '.join(named)}" if named else "")


def _list_of(rows: Rows, names: Sequence[str]) -> str:
    words = {"silence": "silence", "noise": "noise", "black": "black frames", "other_clip": "another clip's frames"}
    return " and ".join(f"{words[n]} changes {_percent(rows[n], 'influence')} of the answers" for n in names)


def _percent(row: Mapping[str, Any], name: str) -> str:
    """ "93 ± 4 %"; if all answers are equal, the bound of the share."""
    share, (low, high) = row[name], row[f"{name}_interval"]
    if share in (0, 1):
        return f"{100 * share:.0f} % (at {'least' if share else 'most'} {100 * (low if share else high):.0f} %)"
    return f"{100 * share:.0f} ± {100 * max(high - share, share - low):.0f} %"


def _points(row: Mapping[str, Any]) -> str:
    low, high = row["interval"]
    return f"{100 * row['difference']:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"
