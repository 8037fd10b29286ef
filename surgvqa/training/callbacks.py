"""Trainer's callbacks as events of the run."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainingArguments

from surgvqa.training import resume
from surgvqa.training.trainer import EventTrainer


class EventCallback(TrainerCallback):
    """Tells the run what happens, and evaluates the last step."""

    def __init__(self, trainer: EventTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.resumed:
            resume.begin(self.trainer)

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> Any:
        if args.eval_strategy == "steps" and state.global_step >= state.max_steps:
            control.should_evaluate = True  # else the last state is never compared with the best
        self.trainer.end_of_step()
        return control

    def on_evaluate(  # type: ignore[override]  # Trainer passes metrics by name
        self, args: TrainingArguments, state: Any, control: Any, metrics: dict[str, float], **_: Any
    ) -> None:
        self.trainer.events.emit("eval", step=state.global_step, **metrics)
