"""`surgvqa train` with scores of the answers during training, which the training room cannot import."""

from __future__ import annotations

from surgvqa.config.options import TrainOptions
from surgvqa.evaluation.score import score
from surgvqa.outcome import Outcome
from surgvqa.runs.folder import Run
from surgvqa.training import command

check, check_before_launch = command.check, command.check_before_launch


def run(options: TrainOptions, run: Run) -> Outcome:
    """Runs training/command.py with a scorer and returns its result."""
    return command.run(options, run, score)
