"""transformers' Trainer, whose loop we keep, with our events, our checkpoints and a stop at any micro step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from transformers import set_seed

from surgvqa.data.numbered import Batch
from surgvqa.data.prompt import IGNORED
from surgvqa.errors import SurgvqaError
from surgvqa.machine.ranks import add_gradients
from surgvqa.machine.sampling import MemorySampler
from surgvqa.model.torch_internals import compilations
from surgvqa.runs.folder import Run
from surgvqa.training import checkpoints, results
from surgvqa.training.answers import HeldOut, LossByType
from surgvqa.training.batches import BatchTrainer
from surgvqa.training.bitsandbytes_internals import without_waiting
from surgvqa.training.random_state import random_state, set_random_state
from surgvqa.training.rollback import OptimizerSnapshot
from surgvqa.training.sharding import remaining
from surgvqa.training.step_down import (
    AnyRankOutOfMemory,
    StepDown,
    TrainingOutOfMemory,
    failure_of_any_rank,
    release_memory,
)

MAX_NON_FINITE = 3  # consecutive steps with a non-finite loss or gradient before the run gives up


class EventTrainer(BatchTrainer):
    """transformers' Trainer with our events, a stop at any micro step, and stepping down when memory runs out.

    The loss of an optimiser step is the mean over all its supervised tokens, however these are distributed over micro
    steps: 4 micro steps of 1 sample equal 1 of 4 samples. Trainer counts `num_items_in_batch`; the model divides by it.
    """

    def __init__(
        self,
        *,
        run: Run,
        record: results.Trained,
        step_down: StepDown,
        sampler: MemorySampler,
        compiled: bool = False,
        held_out: HeldOut | None = None,
        **arguments: Any,
    ):
        super().__init__(run=run, record=record, step_down=step_down, **arguments)
        self.sampler = sampler
        self.compiled = compiled
        self.held_out = held_out
        self.loss_by_type = LossByType(self.eval_dataset.dataset, self.ranks) if self.eval_dataset else None
        self.compilations: dict[str, int] = {}
        """Counts so far, if layers are compiled (torch_internals.compilations)."""
        self._losses: list[float] = []
        self._non_finite = 0
        self._seconds = 0.0
        self._waited_s = 0.0
        self._samples = 0
        self._evaluated = 0
        self._eval_batches = 0
        """This rank's error in the current evaluation."""
        self._samples_at_once: int | None = None
        """Samples of an evaluation batch to compute at once, after a whole batch did not fit."""

    @property
    def weights_are_intact(self) -> bool:
        """Whether weights and optimiser would be those of the last step if work were interrupted now."""
        return self.activity not in ("start", "optimizer", "save")

    # --- steps -------------------------------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: Batch, *arguments: Any, **keywords: Any) -> torch.Tensor:
        """Computes a micro step.

        After running out of memory and stepping down, repeats the window's micro steps so far, with the random state of
        its start and the same samples. Several ranks synchronise at the window's end. If one has run out of
        memory, all of them repeat the window; otherwise their gradients and losses are summed.
        """
        self._stop_if_asked()
        self.activity = "forward and backward"
        window = self.window
        self._bring_up_to_date(inputs, self.train_dataset)
        if not window.batches:
            if self.ranks.count > 1:  # derived from the step, so that no rank's random state has to be saved
                each_its_own = self.state.global_step * self.ranks.count + self.ranks.rank
                set_seed((self.args.seed * 1_000_003 + each_its_own) % 2**32)
            window.random_state = random_state()
        window.batches.append(inputs)
        returned = list(window.losses)
        while not self._compute_window(model, *arguments, **keywords):
            window.losses.clear()
            window.failure = None
            assert window.random_state is not None
            set_random_state(window.random_state)
            for batch in window.batches:
                self._bring_up_to_date(batch, self.train_dataset)
        if self.ranks.count > 1:  # Trainer averages the ranks' losses, so each returns the sum in its last micro step
            return torch.tensor(window.loss if math.isfinite(window.loss) else 0.0, device=self.args.device)
        loss = _finite(window.losses[-1])  # keeps Trainer's running mean finite
        for old, new in zip(returned, window.losses):
            if new is not old:  # repeated; Trainer has added the old loss
                loss = loss + (_finite(new) - _finite(old))
        return loss

    def _compute_window(self, model: Any, *arguments: Any, **keywords: Any) -> bool:
        """Computes the window's micro steps so far. Returns False if they must be repeated with less memory."""
        window = self.window
        try:
            while len(window.losses) < len(window.batches) and not window.failure:
                self.offloaded.bring_back(self.args.device)
                batch = window.batches[len(window.losses)]
                if len(batch["sample_indices"]):
                    window.losses.append(super().training_step(model, batch, *arguments, **keywords))
                else:
                    window.losses.append(torch.zeros((), device=self.args.device))
        except torch.OutOfMemoryError as error:
            window.failure = release_memory(error, self, drop_gradients=True)
        if self.ranks.count > 1 and len(window.batches) < len(window.inputs):
            window.loss = 0.0
            return True  # a failure is shared at the window's end
        failure = failure_of_any_rank(self.ranks, window.failure)
        if failure:
            model.zero_grad(set_to_none=True)
            self.step_down.make_room(failure, self)
            return False
        if self.ranks.count > 1:
            self._sum_over_ranks()
        return True

    def _sum_over_ranks(self) -> None:
        window = self.window
        own_figures = {
            "loss": float(sum(window.losses)),
            "samples": sum(len(batch["sample_indices"]) for batch in window.batches),
            "tokens": sum(batch["tokens"] for batch in window.batches),
            "s": time.monotonic() - window.began,
        }
        ranks = self.ranks.share(own_figures, "step")
        window.loss = sum(rank["loss"] for rank in ranks)
        window.samples = sum(rank["samples"] for rank in ranks)
        window.tokens = sum(rank["tokens"] for rank in ranks)
        slowest = max(rank["s"] for rank in ranks)
        window.rank_wait_s = [slowest - rank["s"] for rank in ranks]
        add_gradients(self.trained, self.ranks)

    def before_optimizer_step(self, model: Any, grad_norm: float, learning_rate: float) -> None:
        """Makes a non-finite step change nothing."""
        self.window.grad_norm = grad_norm
        if self.ranks.count == 1:
            self.window.loss = float(sum(self.window.losses))
        self.window.learning_rate = learning_rate
        if math.isfinite(self.window.grad_norm) and math.isfinite(self.window.loss):
            self._non_finite = 0
            self._losses.append(self.window.loss)
        else:
            self._non_finite += 1
            model.zero_grad(set_to_none=True)
            self._warn_not_finite(self.state.global_step + 1)
        self.activity = "optimizer"

    def create_optimizer(self, *arguments: Any, **keywords: Any) -> torch.optim.Optimizer:
        """Like Trainer's, but the first step, which allocates the moments, can be retried."""
        super().create_optimizer(*arguments, **keywords)
        step, tried = self.optimizer.step, False

        def guarded(optimizer: torch.optim.Optimizer, *arguments: Any, **keywords: Any) -> Any:
            nonlocal tried
            with without_waiting(optimizer):
                if tried:
                    return step(*arguments, **keywords)
                tried = True
                return self._first_optimizer_step(optimizer, lambda: step(*arguments, **keywords))

        method = MethodType(guarded, self.optimizer)  # a method, because schedulers wrap it
        self.optimizer.step = method  # type: ignore[method-assign]  # on purpose
        return self.optimizer

    def _first_optimizer_step(self, optimizer: torch.optim.Optimizer, step: Callable[[], Any]) -> Any:
        before, again = OptimizerSnapshot(optimizer), False
        while True:
            own_failure = None
            try:
                self.offloaded.bring_back(self.args.device)
                done = step()
            except torch.OutOfMemoryError as error:
                own_failure = release_memory(error, self)
            failure = failure_of_any_rank(self.ranks, own_failure)
            if not failure:
                return done
            before.restore()
            if again or not self.step_down.allowed:
                raise self.step_down.stop(failure, self)
            self.step_down.report(failure, "trying again with an emptied cache")
            again = True

    def _warn_not_finite(self, step: int) -> None:
        what = f"loss {self.window.loss:g}, gradient norm {self.window.grad_norm:g}"
        if self._non_finite < MAX_NON_FINITE:
            self.events.warning(f"step {step} is not finite ({what}): skipped, the weights are unchanged")
            return
        self.save_last_step()
        good = next(iter(checkpoints.checkpoints(self.folder)), None)
        raise SurgvqaError(
            f"steps {step - self._non_finite + 1} to {step} are not finite ({what}); last good checkpoint: "
            f"{good or 'none'}; try a lower --learning_rate, or check the samples"
        )

    def end_of_step(self) -> None:
        """Emits the metric event after an optimiser step."""
        window, state = self.window, self.state
        self.activity = "report"
        elapsed = max(time.monotonic() - window.began, 1e-9)
        self._seconds += elapsed
        self._waited_s += window.waited_s
        if self.ranks.count == 1:
            window.samples = sum(len(batch["sample_indices"]) for batch in window.batches)
            window.tokens = sum(batch["tokens"] for batch in window.batches)
        window.batches.clear()
        self.step_down.defragmented = False
        self._samples += window.samples
        self._rng = random_state()
        self.events.emit(
            "metric",
            step=state.global_step,
            total_steps=state.max_steps,
            epoch=state.epoch,
            loss=window.loss,
            learning_rate=window.learning_rate,
            grad_norm=window.grad_norm,
            samples_per_s=window.samples / elapsed,
            tokens_per_s=window.tokens / elapsed,
            data_wait=window.waited_s / elapsed,
            **({"rank_wait": [waited / elapsed for waited in window.rank_wait_s]} if window.rank_wait_s else {}),
            **self._count_compilations(),
        )
        self.events.progress("train", state.global_step, state.max_steps, "steps")
        self._stop_if_asked()
        self._stop_together("end of step")  # Trainer's logging gathers values, so all ranks must be here

    def _count_compilations(self) -> dict[str, int]:
        if not self.compiled:
            return {}
        before, self.compilations = self.compilations, compilations()
        if self.compilations["compile_failures"] and not before.get("compile_failures"):
            self.events.warning("torch.compile failed on a layer, which now runs uncompiled: slower, same result")
        return self.compilations

    def mean_loss(self) -> float | None:
        """Mean training loss of this process's steps; None if there are none."""
        return sum(self._losses) / len(self._losses) if self._losses else None

    def samples_per_s(self) -> float | None:
        """Samples per second in training steps, without evaluation and saving."""
        return self._samples / self._seconds if self._seconds else None

    def data_wait(self) -> float | None:
        """Share of the training steps' time spent waiting for the data loader, 0..1."""
        return self._waited_s / self._seconds if self._seconds else None

    # --- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(self, *arguments: Any, **keywords: Any) -> dict[str, float]:
        """Like Trainer's, but restores the random state, so that an evaluation does not affect training.

        Starts again when the run steps down, so that all samples of one loss are shown in the same way.
        """
        self.sampler.measure("train")
        self.activity = "evaluate"
        self.events.phase("evaluate", f"at step {self.state.global_step}")
        state, metrics = random_state(), None
        try:
            while metrics is None:
                self._evaluated = self._eval_batches = 0
                if self.loss_by_type:
                    self.loss_by_type.begin()
                try:
                    metrics = super().evaluate(*arguments, **keywords)
                    failure = None
                except AnyRankOutOfMemory as error:
                    failure = error.failure
                except torch.OutOfMemoryError as error:  # elsewhere in the loop, where other ranks do not know of it
                    if self.ranks.count > 1:
                        raise
                    failure = release_memory(error, self)
                if failure:  # outside the except block, because the error refers to what uses the memory
                    self.step_down.make_room(failure, self, evaluating=True)
        finally:
            set_random_state(state)
        self.sampler.measure("evaluate")
        self.events.phase("train", f"{self.state.global_step} of {self.state.max_steps} steps done")
        return metrics

    def evaluation_loop(self, *arguments: Any, **keywords: Any) -> Any:
        """Like Trainer's, but adds accuracies of some answers to the metrics, for early stopping and the best state."""
        found: Any = super().evaluation_loop(*arguments, **keywords)
        if self.held_out:
            report = self._answer(self.held_out)
            for name in ("label_accuracy", "keyword_accuracy"):
                found.metrics[f"{keywords.get('metric_key_prefix', 'eval')}_{name}"] = report[name]
        return found

    def _answer(self, held_out: HeldOut) -> Mapping[str, Any]:
        texts: list[str] = []
        failure: TrainingOutOfMemory | None = None
        try:
            model = self.model.get_base_model()
            texts = held_out.answers(model, self.args.device, self.args.bf16, self._stop_if_asked)
        except torch.OutOfMemoryError as error:
            failure = release_memory(error, self)
        failure = failure_of_any_rank(self.ranks, failure)
        if failure:
            raise AnyRankOutOfMemory(failure)
        return held_out.report(self._stop_together("answers", texts), self.state.global_step)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *arguments: Any, **keywords: Any) -> Any:
        """Like Trainer's; in an evaluation also adds to the loss by question type."""
        found = super().compute_loss(model, inputs, *arguments, **keywords)
        if self.loss_by_type and self._at_hand is not None and isinstance(found, tuple):
            self.loss_by_type.add(self._at_hand, inputs, found[1].logits)
        return found

    def prediction_step(self, model: Any, inputs: Batch, *arguments: Any, **keywords: Any) -> Any:
        """Like Trainer's, but when memory runs out, computes half as many samples at once from now on, down to one.

        The batch's loss is still the mean over all its supervised tokens. Raises AnyRankOutOfMemory on all ranks when
        one sample does not fit.
        """
        self._stop_if_asked()
        dealt = len(self.eval_dataset), self.args.eval_batch_size, self._eval_batches, self.ranks.rank, self.ranks.count
        self._eval_batches += 1
        self._keep(inputs, self.eval_dataset, remaining(*dealt))
        found: Any = None
        own_failure = None
        if not len(inputs["sample_indices"]):
            found = torch.zeros((), device=self.args.device), None, None
        while found is None and own_failure is None:
            self._bring_up_to_date(inputs, self.eval_dataset)
            samples = len(inputs["sample_indices"])
            at_once = min(samples, self._samples_at_once or samples)
            try:
                if at_once == samples:
                    found = self._predict(model, inputs, *arguments, **keywords)
                else:
                    found = self._predict_in_parts(model, inputs, at_once, *arguments, **keywords)
            except torch.OutOfMemoryError as error:
                failure = release_memory(error, self)
                if at_once == 1 or not self.step_down.allowed:
                    own_failure = failure
                else:
                    self._samples_at_once = at_once // 2
                    self.step_down.report(failure, f"evaluating {self._samples_at_once} at once")
        failure_of_any = failure_of_any_rank(self.ranks, own_failure)
        if failure_of_any:
            raise AnyRankOutOfMemory(failure_of_any)
        self._evaluated += sum(self._stop_together("evaluate", len(inputs["sample_indices"])))
        self.events.progress("evaluate", self._evaluated, len(self.eval_dataset), "samples")
        return found

    def _predict(self, model: Any, inputs: Batch, *arguments: Any, **keywords: Any) -> Any:
        self._at_hand = list(inputs["sample_indices"])
        try:
            return super().prediction_step(model, inputs, *arguments, **keywords)
        finally:
            self._at_hand = None

    def _predict_in_parts(self, model: Any, inputs: Batch, at_once: int, *arguments: Any, **keywords: Any) -> Any:
        indices, tokens = inputs["sample_indices"], 0
        total: Any = 0.0
        for start in range(0, len(indices), at_once):
            part = self._encoded(self.eval_dataset, indices[start : start + at_once])
            count = int((part["labels"] != IGNORED).sum())
            found: Any = self._predict(model, part, *arguments, **keywords)
            total, tokens = total + found[0] * count, tokens + count
        return total / tokens, None, None


def _finite(loss: torch.Tensor) -> torch.Tensor:
    return torch.where(loss.isfinite(), loss, torch.zeros_like(loss))
