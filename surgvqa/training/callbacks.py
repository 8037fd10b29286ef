"""Turns Trainer's callbacks into events of the run."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainingArguments

from surgvqa.machine.ranks import same_weights
from surgvqa.model.adapter import adapter_parameters
from surgvqa.training import resume
from surgvqa.training.trainer import EventTrainer


class EventCallback(TrainerCallback):
    """Emits events of the run, and makes Trainer evaluate the last step."""

    def __init__(self, trainer: EventTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if self.trainer.ranks.count > 1:
            same_weights(adapter_parameters(self.trainer.model).values())
        if self.trainer.resumed:
            resume.begin(self.trainer)

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> Any:
        if args.eval_strategy == "steps" and state.global_step >= state.max_steps:
            control.should_evaluate = True  # otherwise the last state would never be compared with the best
        self.trainer.end_of_step()
        return control

    def on_evaluate(  # type: ignore[override]  # Trainer passes metrics by name
        self, args: TrainingArguments, state: Any, control: Any, metrics: dict[str, float], **_: Any
    ) -> None:
        losses = self.trainer.loss_by_type
        by_type = {"loss_by_type": losses.result()} if losses else {}
        self.trainer.events.emit("eval", step=state.global_step, **metrics, **by_type)
