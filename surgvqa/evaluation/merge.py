"""`surgvqa merge`: merges and, with --verify, compares answers before and after. Light to import."""

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
"""{dtype of the computation: limit that a correct merge stays below}. On the demo (float32) a correct merge has 0, one
that leaves out one of its 15 changed tensors 0.016 to 0.8, one with a transposed module 0.025 or more, one with a
doubled scale 0.98. In bfloat16 every product rounds again."""


@dataclass
class Verification:
    """Compares base + adapter with the merged checkpoint on the same samples."""

    samples: int
    largest_logit_gap: float
    """Over all tokens of the vocabulary at all positions of the true answers."""
    gap_share: float
    """Root mean square of the gaps relative to that of the adapter's own changes: the effect of rounding weights."""
    unexplained_share: float
    """The same against PEFT's own merge, rounded to bfloat16: the part that rounding does not explain."""
    dtype: str
    """Dtype of the computation."""
    answers_that_differ: list[dict[str, str]]
    """[{id, adapter's answer, merged checkpoint's answer}]."""

    @property
    def ok(self) -> bool:
        """Whether they are the same model except for rounding; False for NaN."""
        return self.unexplained_share <= MOST_UNEXPLAINED[self.dtype]

    @property
    def verdict(self) -> str:
        """The result in one sentence."""
        same = self.samples - len(self.answers_that_differ)
        figures = (
            f"{same} of {self.samples} answers are the same, logits differ by {self.largest_logit_gap:.3g} at most, "
            f"{self.gap_share:.1%} of what the adapter changes; {self.unexplained_share:.1%} is not due to rounding"
        )
        return ("the same model except for rounding: " if self.ok else "NOT the same model: ") + figures

    def data(self) -> dict[str, Any]:
        return {**vars(self), "ok": self.ok, "verdict": self.verdict}


def check(options: MergeOptions) -> None:
    """Like the merge's own check; with --verify also checks the packages and samples that it needs."""
    command.check(options)
    if not options.verify:
        return
    require_installed("--verify", TRAIN, "train")
    needed = ("eval_data_path", "frames_dir", "audio_dir")
    missing = [f"--{name}" for name in needed if not getattr(options, name)]
    if missing:
        raise UsageError(f"--verify needs samples to answer: missing {', '.join(missing)}")
    if options.projector:
        raise UsageError(
            "--verify compares with base + adapter, which do not include --projector; use only one of them"
        )
    check_samples(
        str(options.eval_data_path), str(options.frames_dir), str(options.eval_audio_dir or options.audio_dir)
    )


def run(options: MergeOptions, run: Run) -> Outcome:
    """Merges; with --verify N also answers N samples both ways. Exit code 1 if the models differ."""
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
    """Options that evaluate the merged checkpoint or the adapter on its base."""
    return EvaluateOptions(
        checkpoint=options.output_path if merged else options.stage2_adapter_path,
        model_name_or_path=None if merged else options.stage1_model_path,
        eval_data_path=options.eval_data_path,
        frames_dir=options.frames_dir,
        audio_dir=options.eval_audio_dir or options.audio_dir,
        device="cpu" if options.device == "cpu" else "auto",
    )
