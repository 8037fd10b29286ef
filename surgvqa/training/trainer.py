"""transformers' Trainer with our events, our checkpoints and a stop at any micro step; the loop itself is theirs.

A run can be stopped and resumed as if it had not been: a checkpoint holds adapter, optimiser, scheduler, position in
the data and random state as they were after the last optimiser step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch

from surgvqa.data.numbered import Batch, Numbered
from surgvqa.data.prompt import IGNORED
from surgvqa.errors import SurgvqaError
from surgvqa.machine.sampling import MemorySampler
from surgvqa.model.torch_internals import compilations
from surgvqa.runs.folder import Run
from surgvqa.training import checkpoints, results
from surgvqa.training.random_state import random_state, set_random_state
from surgvqa.training.rollback import OptimizerSnapshot
from surgvqa.training.saving import SavingTrainer, Window
from surgvqa.training.step_down import StepDown, let_go
from surgvqa.training.stopping import StopRequested

MAX_NON_FINITE = 3  # steps in a row with a loss or gradient that is not finite, before the run gives up


class EventTrainer(SavingTrainer):
    """transformers' Trainer with our events, a stop at any micro step, and stepping down when memory runs out.

    The loss of an optimiser step is the mean over all its supervised tokens, however they are spread over micro steps:
    4 micro steps of 1 sample are 1 of 4 samples (Trainer counts `num_items_in_batch`, the model divides by it).
    """

    def __init__(
        self,
        *,
        run: Run,
        record: results.Trained,
        step_down: StepDown,
        sampler: MemorySampler,
        compiled: bool = False,
        **arguments: Any,
    ):
        super().__init__(run=run, record=record, step_down=step_down, **arguments)
        self.sampler = sampler
        self.compiled = compiled
        self.compilations: dict[str, int] = {}
        """So far, when layers are compiled (torch_internals.compilations)."""
        self.stopping = False
        self._losses: list[float] = []
        self._non_finite = 0
        self._seconds = 0.0
        self._waited_s = 0.0
        self._samples = 0
        self._evaluated = 0
        self._samples_at_once: int | None = None
        """Samples of an evaluation batch that go through the model at once, after one did not fit."""

    @property
    def weights_are_whole(self) -> bool:
        """Whether the weights and the optimiser are as the last step left them, should work be cut short now."""
        return self.activity not in ("start", "optimizer", "save")

    # --- steps -------------------------------------------------------------------------------------------------------

    def request_stop(self) -> None:
        """Called from a signal handler: training ends before its next micro step."""
        self.stopping = True

    def _stop_if_asked(self) -> None:
        if self.stopping:
            raise StopRequested

    def get_batch_samples(self, *arguments: Any, **keywords: Any) -> Any:
        self.window = Window(time.monotonic())
        self.activity = "load batch"
        found = super().get_batch_samples(*arguments, **keywords)
        self.window.inputs = found[0]
        self.window.waited_s = time.monotonic() - self.window.began
        return found

    def model_inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Without the padding mask: rows are padded on the right, where causal attention never looks, and a mask would
        cost the flash kernel."""
        left_out = ("attention_mask", "sample_indices", "shown", "tokens")
        return {name: value for name, value in batch.items() if name not in left_out}

    def _encoded(self, dataset: Numbered, indices: list[int]) -> Batch:
        """These samples as they are shown now, on the training device."""
        return self.on_device(self.data_collator([dataset[index] for index in indices]))

    def _bring_up_to_date(self, batch: Batch, dataset: Numbered) -> None:
        """Encodes a batch again when it was made before the run stepped down. In place: Trainer holds it too."""
        if not dataset.is_current(batch):
            current = self._encoded(dataset, batch["sample_indices"])
            batch.clear()
            batch.update(current)

    def training_step(self, model: Any, inputs: Batch, *arguments: Any, **keywords: Any) -> torch.Tensor:
        """A micro step. Out of memory: the window's micro steps so far are done again, from the random state of its
        start and with the same samples, once less memory is needed."""
        self._stop_if_asked()
        self.activity = "forward and backward"
        window = self.window
        self._bring_up_to_date(inputs, self.train_dataset)
        if not window.batches:
            window.random_state = random_state()
        window.batches.append(inputs)
        returned = list(window.losses)
        while len(window.losses) < len(window.batches):
            try:
                self.offloaded.bring_back(self.args.device)
                batch = window.batches[len(window.losses)]
                window.losses.append(super().training_step(model, batch, *arguments, **keywords))
            except torch.OutOfMemoryError as error:
                self.step_down.make_room(let_go(error, self, drop_gradients=True), self)
                window.losses.clear()
                assert window.random_state is not None
                set_random_state(window.random_state)
                for batch in window.batches:
                    self._bring_up_to_date(batch, self.train_dataset)
        loss = _finite(window.losses[-1])  # Trainer's own running mean stays finite
        for old, new in zip(returned, window.losses):
            if new is not old:  # done again: Trainer has added the old one
                loss = loss + (_finite(new) - _finite(old))
        return loss

    def before_optimizer_step(self, model: Any, grad_norm: float, learning_rate: float) -> None:
        """A step that is not finite changes nothing."""
        self.window.grad_norm = grad_norm
        self.window.loss = float(sum(self.window.losses))
        self.window.learning_rate = learning_rate
        if math.isfinite(self.window.grad_norm) and math.isfinite(self.window.loss):
            self._non_finite = 0
            self._losses.append(self.window.loss)
        else:
            self._non_finite += 1
            model.zero_grad(set_to_none=True)
            self._complain(self.state.global_step + 1)
        self.activity = "optimizer"

    def create_optimizer(self, *arguments: Any, **keywords: Any) -> torch.optim.Optimizer:
        """As Trainer's; its first step, which makes the moments, can be tried twice."""
        super().create_optimizer(*arguments, **keywords)
        step, tried = self.optimizer.step, False

        def guarded(optimizer: torch.optim.Optimizer, *arguments: Any, **keywords: Any) -> Any:
            nonlocal tried
            if tried:
                return step(*arguments, **keywords)
            tried = True
            return self._first_optimizer_step(optimizer, lambda: step(*arguments, **keywords))

        method = MethodType(guarded, self.optimizer)  # a method: schedulers wrap it
        self.optimizer.step = method  # type: ignore[method-assign]  # on purpose
        return self.optimizer

    def _first_optimizer_step(self, optimizer: torch.optim.Optimizer, step: Callable[[], Any]) -> Any:
        before = OptimizerSnapshot(optimizer)
        try:
            return step()
        except torch.OutOfMemoryError as error:
            failure = let_go(error, self)
            before.restore()
        if not self.step_down.allowed:
            raise self.step_down.stop(failure, self)
        self.step_down.say(failure, "trying again with an emptied cache")
        try:
            self.offloaded.bring_back(self.args.device)
            return step()
        except torch.OutOfMemoryError as error:
            failure = let_go(error, self)
            before.restore()
        raise self.step_down.stop(failure, self)

    def _complain(self, step: int) -> None:
        what = f"loss {self.window.loss:g}, gradient norm {self.window.grad_norm:g}"
        if self._non_finite < MAX_NON_FINITE:
            self.events.warning(f"step {step} is not finite ({what}): left out, the weights stay as they were")
            return
        self.save_last_step()
        good = next(iter(checkpoints.checkpoints(self.folder)), None)
        raise SurgvqaError(
            f"steps {step - self._non_finite + 1} to {step} are not finite ({what}); last good checkpoint: "
            f"{good or 'none'}; try a lower --learning_rate, or look at the samples"
        )

    def end_of_step(self) -> None:
        """After an optimiser step: its metric event."""
        window, state = self.window, self.state
        self.activity = "report"
        elapsed = max(time.monotonic() - window.began, 1e-9)
        self._seconds += elapsed
        self._waited_s += window.waited_s
        samples = sum(len(batch["sample_indices"]) for batch in window.batches)
        tokens = sum(batch["tokens"] for batch in window.batches)
        window.batches.clear()
        self.step_down.defragmented = False
        self._samples += samples
        self._rng = random_state()
        self.events.emit(
            "metric",
            step=state.global_step,
            total_steps=state.max_steps,
            epoch=state.epoch,
            loss=window.loss,
            learning_rate=window.learning_rate,
            grad_norm=window.grad_norm,
            samples_per_s=samples / elapsed,
            tokens_per_s=tokens / elapsed,
            data_wait=window.waited_s / elapsed,
            **self._count_compilations(),
        )
        self.events.progress("train", state.global_step, state.max_steps, "steps")
        self._stop_if_asked()

    def _count_compilations(self) -> dict[str, int]:
        if not self.compiled:
            return {}
        before, self.compilations = self.compilations, compilations()
        if self.compilations["compile_failures"] and not before.get("compile_failures"):
            self.events.warning("torch.compile gave up on a layer, which now runs uncompiled: slower, the same result")
        return self.compilations

    def mean_loss(self) -> float | None:
        """Mean training loss of the steps of this process; None without any."""
        return sum(self._losses) / len(self._losses) if self._losses else None

    def samples_per_s(self) -> float | None:
        """Over the training steps, without evaluation and saving."""
        return self._samples / self._seconds if self._seconds else None

    def data_wait(self) -> float | None:
        """Share of the training steps' time in which nothing was done but waiting for the data loader, 0..1."""
        return self._waited_s / self._seconds if self._seconds else None

    # --- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(self, *arguments: Any, **keywords: Any) -> dict[str, float]:
        """As Trainer's, leaving the random state alone: training goes on the same with or without an evaluation.

        It begins again when the run steps down, so that one loss is of one way of showing the samples.
        """
        self.sampler.measure("train")
        self.activity = "evaluate"
        self.events.phase("evaluate", f"at step {self.state.global_step}")
        state, metrics = random_state(), None
        try:
            while metrics is None:
                self._evaluated = 0
                try:
                    metrics = super().evaluate(*arguments, **keywords)
                except torch.OutOfMemoryError as error:
                    self.step_down.make_room(let_go(error, self), self, evaluating=True)
        finally:
            set_random_state(state)
        self.sampler.measure("evaluate")
        self._last_eval_loss = metrics.get("eval_loss")
        self.events.phase("train", f"{self.state.global_step} of {self.state.max_steps} steps done")
        return metrics

    def prediction_step(self, model: Any, inputs: Batch, *arguments: Any, **keywords: Any) -> Any:
        """Out of memory: half as many samples at once from now on, down to one. The batch's loss stays the mean over
        all its supervised tokens."""
        self._stop_if_asked()
        found = None
        while found is None:
            self._bring_up_to_date(inputs, self.eval_dataset)
            samples = len(inputs["sample_indices"])
            at_once = min(samples, self._samples_at_once or samples)
            try:
                if at_once == samples:
                    found = super().prediction_step(model, inputs, *arguments, **keywords)
                else:
                    found = self._predict_in_parts(model, inputs, at_once, *arguments, **keywords)
            except torch.OutOfMemoryError as error:
                if at_once == 1 or not self.step_down.allowed:
                    raise
                self._samples_at_once = at_once // 2
                self.step_down.say(let_go(error, self), f"evaluating {self._samples_at_once} at once")
        self._evaluated += samples
        self.events.progress("evaluate", self._evaluated, len(self.eval_dataset), "samples")
        return found

    def _predict_in_parts(self, model: Any, inputs: Batch, at_once: int, *arguments: Any, **keywords: Any) -> Any:
        indices, tokens = inputs["sample_indices"], 0
        total: Any = 0.0
        for start in range(0, len(indices), at_once):
            part = self._encoded(self.eval_dataset, indices[start : start + at_once])
            count = int((part["labels"] != IGNORED).sum())
            found: Any = super().prediction_step(model, part, *arguments, **keywords)
            total, tokens = total + found[0] * count, tokens + count
        return total / tokens, None, None


def _finite(loss: torch.Tensor) -> torch.Tensor:
    return torch.where(loss.isfinite(), loss, torch.zeros_like(loss))
