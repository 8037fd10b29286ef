"""When a run evaluates and saves, and which state is the best."""

from __future__ import annotations

from typing import Any

from surgvqa.config.options import TrainOptions


def evaluates(options: TrainOptions) -> bool:
    """Whether the run evaluates during training."""
    return bool(options.eval_data_path) and options.do_eval and options.eval_strategy != "no"


def schedule(options: TrainOptions) -> tuple[dict[str, Any], list[str]]:
    """(consistent TrainingArguments fields for evaluating, saving and the best state; notes on what was changed).

    transformers refuses to end with the best model unless every evaluated state is saved.
    """
    notes: list[str] = []
    planned: dict[str, Any] = {
        "eval_strategy": options.eval_strategy,
        "eval_steps": options.eval_steps,
        "save_strategy": options.save_strategy,
        "save_steps": options.save_steps,
        "load_best_model_at_end": options.load_best_model_at_end,
        "metric_for_best_model": options.metric_for_best_model,
        "greater_is_better": options.greater_is_better,
    }
    if not evaluates(options):
        why = (
            "no eval_data_path"
            if not options.eval_data_path
            else "do_eval is false"
            if not options.do_eval
            else "eval_strategy is no"
        )
        early = ", and nothing stops early" if options.early_stopping_patience else ""
        notes.append(f"{why}: no evaluation, so the result is the last state, not the best one{early}")
        planned |= {"eval_strategy": "no", "eval_steps": None, "load_best_model_at_end": False}
        planned |= {"metric_for_best_model": None, "greater_is_better": None}
        if options.save_strategy == "best":
            planned["save_strategy"] = "epoch"
            notes.append("save_strategy is best, which needs evaluation: saving every epoch")
        return planned, notes
    if options.eval_strategy == "steps" and options.eval_steps is None:
        planned["eval_steps"] = options.save_steps
    if options.load_best_model_at_end and options.save_strategy != "best":
        if options.save_strategy != options.eval_strategy:
            notes.append(
                f"load_best_model_at_end: save_strategy {options.save_strategy} follows eval_strategy "
                f"{options.eval_strategy}"
            )
            planned["save_strategy"] = options.eval_strategy
        every = planned["eval_steps"]
        if planned["save_strategy"] == "steps" and options.save_steps % every:
            planned["save_steps"] = (options.save_steps // every + 1) * every
            notes.append(
                f"load_best_model_at_end: save_steps {options.save_steps} is not a multiple of eval_steps {every}; "
                f"saving every {planned['save_steps']} steps"
            )
    return planned, notes
