"""transformers' Trainer with our events, our checkpoints and a stop at any micro step; the loop itself is theirs.

A run can be stopped and resumed as if it had not been: a checkpoint holds adapter, optimiser, scheduler, position in
the data and random state as they were after the last optimiser step.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import rotate_checkpoints

from surgvqa.data.numbered import Batch, Numbered
from surgvqa.data.prompt import IGNORED
from surgvqa.errors import SurgvqaError, UsageError, first_line
from surgvqa.machine.sampling import MemorySampler
from surgvqa.memory.retreat import SHOWN
from surgvqa.model.adapter import adapter_parameters, save_adapter
from surgvqa.model.torch_internals import compilations
from surgvqa.runs.folder import Run
from surgvqa.training import checkpoints, optimiser, results
from surgvqa.training.random_state import random_state, set_random_state
from surgvqa.training.rollback import Aside, OptimizerSnapshot
from surgvqa.training.step_down import StepDown, take
from surgvqa.training.stopping import StopRequested

MAX_NON_FINITE = 3  # steps in a row with a loss or gradient that is not finite, before the run gives up


@dataclass
class Window:
    """One optimiser step in the making."""

    began: float
    waited_s: float = 0.0
    inputs: list[Batch] = field(default_factory=list)
    """Of all its micro steps, on the training device."""
    batches: list[Batch] = field(default_factory=list)
    """Of the micro steps so far."""
    losses: list[torch.Tensor] = field(default_factory=list)
    """The micro steps' losses, each already divided by the window's supervised tokens."""
    random_state: dict[str, Any] | None = None
    """Before the first micro step."""
    loss: float = math.nan
    grad_norm: float | None = None
    learning_rate: float | None = None


class EventTrainer(Trainer):
    """transformers' Trainer with our events, checkpoints in our format, and a stop at any micro step.

    The loss of an optimiser step is the mean over all its supervised tokens, however they are spread over micro steps:
    4 micro steps of 1 sample are 1 of 4 samples (Trainer counts `num_items_in_batch`, the model divides by it).
    """

    # Trainer types these loosely; here they are always there, and of these kinds.
    model: PeftModel
    optimizer: torch.optim.Optimizer
    train_dataset: Numbered
    eval_dataset: Numbered

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
        super().__init__(**arguments)
        self.remove_callback(PrinterCallback)  # our own events say it
        # "The model has a device map": else Accelerate fetches back to the GPU what has left it
        self.accelerator.verify_device_map = lambda model: True
        if not self.model_accepts_loss_kwargs:
            raise SurgvqaError("the model does not take num_items_in_batch: gradients would be scaled wrongly")
        self.model.train = MethodType(_train, self.model)  # type: ignore[method-assign]  # on purpose
        self.events = run
        self.record = record
        self.step_down = step_down
        self.sampler = sampler
        self.aside = Aside()
        self.compiled = compiled
        self.compilations: dict[str, int] = {}
        """So far, when layers are compiled (torch_internals.compilations)."""
        self.activity = "start"
        """For an out-of-memory report: load batch, forward and backward, optimizer, report, evaluate or save."""
        self.window = Window(time.monotonic())
        self.stopping = False
        self.resumed: Path | None = None
        """The checkpoint that this training goes on from."""
        self._rng: dict[str, Any] | None = None
        self._losses: list[float] = []
        self._non_finite = 0
        self._seconds = 0.0
        self._waited_s = 0.0
        self._samples = 0
        self._evaluated = 0
        self._last_eval_loss: float | None = None
        self._is_best_of: tuple[int, float] | None = None
        """(step, evaluation loss) of the weights, once the best ones are back in the model."""
        self._staging: str | None = None
        self._samples_at_once: int | None = None
        """Samples of an evaluation batch that go through the model at once, after one did not fit."""

    @property
    def intact(self) -> bool:
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

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        """The model stays where it is: load_model put it there, and what no step needs has left the GPU. (On a GPU
        tests/surgvqa/training/test_train_gpu.py looks; on a CPU nothing can be in the wrong place.)"""

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: Trainer would go through all modules for it at every micro step."""
        return 0

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Without the padding mask: rows are padded on the right, where causal attention never looks, and a mask would
        cost the flash kernel."""
        prepared = super()._prepare_inputs(inputs)
        for name in ("attention_mask", "sample_indices", "shown", "tokens"):
            prepared.pop(name, None)
        return prepared

    def _encoded(self, dataset: Numbered, indices: list[int]) -> Batch:
        """These samples as they are shown now, on the training device."""
        return super()._prepare_inputs(self.data_collator([dataset[index] for index in indices]))

    def _bring_up_to_date(self, batch: Batch, dataset: Numbered) -> None:
        """Encodes a batch again that comes from before a retreat; in place, Trainer holds it too."""
        if not dataset.is_current(batch):
            current = self._encoded(dataset, batch["sample_indices"])
            batch.clear()
            batch.update(current)

    def training_step(self, model: Any, inputs: Batch, *arguments: Any, **keywords: Any) -> torch.Tensor:
        """A micro step. Out of memory: the window's micro steps so far are done again, from the random state of its
        start and with the same samples, after the retreat."""
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
                self.aside.bring_back(self.args.device)
                batch = window.batches[len(window.losses)]
                window.losses.append(super().training_step(model, batch, *arguments, **keywords))
            except torch.OutOfMemoryError as error:
                self.step_down.meet(take(error, self, drop_gradients=True), self)
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

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The hook between the last backward pass and the optimiser: a step that is not finite changes nothing."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self.window.grad_norm = float(norm)
        self.window.loss = float(sum(self.window.losses))
        self.window.learning_rate = self._get_learning_rate()
        if math.isfinite(self.window.grad_norm) and math.isfinite(self.window.loss):
            self._non_finite = 0
            self._losses.append(self.window.loss)
        else:
            self._non_finite += 1
            model.zero_grad(set_to_none=True)
            self._complain(self.state.global_step + 1)
        self.activity = "optimizer"
        return norm

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
            lack = take(error, self)
            before.restore()
        if not self.step_down.allowed:
            raise self.step_down.stop(lack, self)
        self.step_down.say(lack, "trying again with an emptied cache")
        try:
            self.aside.bring_back(self.args.device)
            return step()
        except torch.OutOfMemoryError as error:
            lack = take(error, self)
            before.restore()
        raise self.step_down.stop(lack, self)

    def _complain(self, step: int) -> None:
        what = f"loss {self.window.loss:g}, gradient norm {self.window.grad_norm:g}"
        if self._non_finite < MAX_NON_FINITE:
            self.events.warning(f"step {step} is not finite ({what}): left out, the weights stay as they were")
            return
        self.save_last_step()
        good = next(iter(checkpoints.checkpoints(self._folder)), None)
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

        After a retreat it begins again, so that one loss is of one way of showing the samples.
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
                    self.step_down.meet(take(error, self), self, evaluating=True)
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
                self.step_down.say(take(error, self), f"evaluating {self._samples_at_once} at once")
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

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """A new best is saved at once: with save_steps above eval_steps Trainer would keep an older state as best."""
        is_best = super()._determine_best_metric(metrics=metrics, trial=trial)
        if is_best and self.args.load_best_model_at_end:
            self.control.should_save = True
        return is_best

    def reported_eval_loss(self) -> float | None:
        """The evaluation loss of the state that is the result."""
        return self._is_best_of[1] if self._is_best_of else self._last_eval_loss

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        step, loss = self._is_best_of or (self.state.global_step, self._last_eval_loss)
        document = self.record.document() | {"step": step, "eval_loss": loss}
        save_adapter(self.model, output_dir or self._folder, document)

    @property
    def _folder(self) -> Path:
        """Of the checkpoints."""
        return Path(str(self.args.output_dir))

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or str(self._folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.activity = "save"
        try:
            return self._write_checkpoint(model, trial)
        except torch.OutOfMemoryError as error:
            self.step_down.say(take(error, self), "trying again with an emptied cache")
        try:
            return self._write_checkpoint(model, trial)
        except torch.OutOfMemoryError as error:
            lack = take(error, self)
        raise self.step_down.stop(lack, self, intact=False)

    def _write_checkpoint(self, model: Any, trial: Any) -> None:
        """Written to a folder of its own and renamed when it is whole."""
        final = self._folder / f"checkpoint-{self.state.global_step}"
        staging = self._folder / ".saving"
        shutil.rmtree(staging, ignore_errors=True)
        self._staging = str(staging)
        try:
            super()._save_checkpoint(model, trial)
            best = final.with_name(f"checkpoint-{self.state.best_global_step}")
            if best.is_dir() or best == final:
                self.state.best_model_checkpoint = str(best)
            self.state.save_to_json(str(staging / final.name / "trainer_state.json"))  # not with the staging path
            checkpoints.publish(staging / final.name, final)
        except torch.OutOfMemoryError:
            raise
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors on a full disk
            raise SurgvqaError(
                f"{final}: the checkpoint cannot be saved ({first_line(error)}); free some disk space and go "
                f"on with --resume {self.events.id}"
            ) from error
        finally:
            self._staging = None
            shutil.rmtree(staging, ignore_errors=True)
        rotate_checkpoints(
            output_dir=str(self._folder),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
        )
        self.events.emit("checkpoint", step=self.state.global_step, path=str(final))

    def save_last_step(self) -> None:
        """A checkpoint of the last whole optimiser step, with the random state of then; none before the first step."""
        final = self._folder / f"checkpoint-{self.state.global_step}"
        if self.state.global_step == 0 or (final.is_dir() and not checkpoints.damage_of(final)):
            return
        if self._rng:
            set_random_state(self._rng)
        self._save_checkpoint(self.model, None)

    def restore(self, folder: str | Path) -> None:
        """Puts the adapter of a checkpoint into the model; every tensor must have its place."""
        path = Path(folder) / checkpoints.ADAPTER
        tensors, slots = load_file(path), adapter_parameters(self.model)
        for name in sorted(tensors.keys() | slots.keys()):
            found = tuple(tensors[name].shape) if name in tensors else "missing"
            expected = tuple(slots[name].shape) if name in slots else "none"
            if found != expected:
                raise UsageError(
                    f"{path}: {name} is {found}, expected {expected}; a resumed run keeps its base model and its LoRA "
                    "options"
                )
        with torch.no_grad():
            for name, slot in slots.items():
                slot.copy_(tensors[name])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.restore(resume_from_checkpoint)
        self.resumed = Path(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        asked = optimiser.hyperparameters(self.optimizer)
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint:
            optimiser.keep_asked(self.optimizer, self.lr_scheduler, asked, checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        assert best is not None
        self.restore(best)
        written = results.read(Path(best))
        if written:  # it may be from before a retreat, and is to be evaluated as it was trained
            self.record.options |= {name: written.options[name] for name in SHOWN if name in written.options}
            self.record.preset = written.preset
        step, metric = self.state.best_global_step, self.state.best_metric
        self._is_best_of = None if step is None or metric is None else (step, metric)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        self._rng = random_state()


def _train(model: Any, mode: bool = True) -> Any:
    """As nn.Module.train, unless the model trains already: Trainer asks for it at every micro step, and going through
    3,000 modules takes 10 ms and more, in which the GPU runs out of work."""
    if mode and model.training and model.get_base_model().training:
        return model
    return type(model).train(model, mode)


def _finite(loss: torch.Tensor) -> torch.Tensor:
    return torch.where(loss.isfinite(), loss, torch.zeros_like(loss))
