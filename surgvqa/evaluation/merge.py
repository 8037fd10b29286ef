"""`surgvqa merge`: the merge and, with --verify, its proof: answers before and after. Light to import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from surgvqa.config.options import EvaluateOptions, MergeOptions
from surgvqa.data.lookup import check_samples
from surgvqa.errors import UsageError
from surgvqa.machine.packages import TRAIN, require_installed
from surgvqa.merge import command
from surgvqa.outcome import Outcome
from surgvqa.runs.folder import Run

MOST_UNEXPLAINED = {"float32": 0.01, "bfloat16": 0.05}
"""Dtype of the computation -> what a right merge stays under. On the demo (float32) a right one has 0, one of its 15
changed tensors left out 0.016 to 0.8, a module transposed 0.025 or more, a doubled scale 0.98. In bfloat16 every
product rounds again."""


@dataclass
class Verification:
    """What base + adapter and the merged checkpoint say of the same samples."""

    samples: int
    largest_logit_gap: float
    """Of any token of the vocabulary at any place of a true answer."""
    gap_share: float
    """Root mean square of the gaps, in that of what the adapter itself changes: what rounding the weights costs."""
    unexplained_share: float
    """The same against the adapter as PEFT merges it, rounded to bfloat16: what no rounding explains."""
    dtype: str
    """Of the computation."""
    answers_that_differ: list[dict[str, str]]
    """id, adapter's answer, merged checkpoint's answer."""

    @property
    def ok(self) -> bool:
        """Whether they are the same model but for rounding; NaN is not."""
        return self.unexplained_share <= MOST_UNEXPLAINED[self.dtype]

    @property
    def verdict(self) -> str:
        """One sentence for people."""
        same = self.samples - len(self.answers_that_differ)
        figures = (
            f"{same} of {self.samples} answers are the same, logits differ by {self.largest_logit_gap:.3g} at most, "
            f"{self.gap_share:.1%} of what the adapter changes; {self.unexplained_share:.1%} is not by rounding"
        )
        return ("the same model but for rounding: " if self.ok else "NOT the same model: ") + figures

    def data(self) -> dict[str, Any]:
        return {**vars(self), "ok": self.ok, "verdict": self.verdict}


def check(options: MergeOptions) -> None:
    """As the merge's own; with --verify also the packages and the samples that it needs."""
    command.check(options)
    if not options.verify:
        return
    require_installed("--verify", TRAIN, "train")
    needed = ("eval_data_path", "frames_dir", "audio_dir")
    missing = [f"--{name}" for name in needed if not getattr(options, name)]
    if missing:
        raise UsageError(f"--verify needs samples to answer: missing {', '.join(missing)}")
    if options.projector:
        raise UsageError("--verify compares with base + adapter, which know nothing of --projector; leave one of them")
    check_samples(
        str(options.eval_data_path), str(options.frames_dir), str(options.eval_audio_dir or options.audio_dir)
    )


def run(options: MergeOptions, run: Run) -> Outcome:
    """Merges; with --verify N also answers N samples both ways. Exit 1 when these are not the same model."""
    merged = command.run(options, run)
    if not options.verify or options.dry_run or not merged.ok:
        return merged
    from surgvqa.evaluation.same_model import compare

    found = compare(evaluation(options, merged=False), evaluation(options, merged=True), options.verify, run)
    if not found.ok:
        run.warning(found.verdict)

    def show(console: Any) -> None:
        if merged.show:
            merged.show(console)
        console.print(found.verdict, style="green" if found.ok else "red", markup=False)
        for entry in found.answers_that_differ[:10]:
            console.print(f"  {entry['id']}: {entry['adapter']!r}, merged {entry['merged']!r}", markup=False)

    return Outcome({**merged.data, "verify": found.data()}, found.ok, show)


def evaluation(options: MergeOptions, merged: bool) -> EvaluateOptions:
    """The merged checkpoint, or the adapter on its base, as something to evaluate."""
    return EvaluateOptions(
        checkpoint=options.output_path if merged else options.stage2_adapter_path,
        model_name_or_path=None if merged else options.stage1_model_path,
        eval_data_path=options.eval_data_path,
        frames_dir=options.frames_dir,
        audio_dir=options.eval_audio_dir or options.audio_dir,
        device="cpu" if options.device == "cpu" else "auto",
    )
