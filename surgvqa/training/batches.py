"""The batches of a trainer: which samples this rank has, shown as they are now; and where the ranks meet for them."""

from __future__ import annotations

import time
from typing import Any

import torch

from surgvqa.data.numbered import Batch, Numbered
from surgvqa.data.prompt import IGNORED
from surgvqa.training.saving import SavingTrainer, Window
from surgvqa.training.sharding import optimiser_steps, remaining
from surgvqa.training.stopping import StopRequested


class BatchTrainer(SavingTrainer):
    """Trainer with batches of ours, and a stop between any two of them."""

    def __init__(self, **arguments: Any):
        super().__init__(**arguments)
        self.stopping = False
        self._at_hand: list[int] | None = None
        """The samples whose loss is computed, in an evaluation."""

    def request_stop(self) -> None:
        """Called from a signal handler: training ends before its next micro step."""
        self.stopping = True

    def _stop_if_asked(self) -> None:
        if self.stopping and self.ranks.count == 1:
            raise StopRequested
        if self.stopping:  # at the next place where all ranks meet; or torchrun ends us because another one is gone
            self.ranks.look()

    def _stop_together(self, what: str, said: Any = None) -> list[Any]:
        """What each rank has `said`, at a place where all of them meet. StopRequested on all when one was asked to."""
        shared = self.ranks.share([self.stopping, said], what)
        if self.ranks.count > 1 and any(stopping for stopping, _ in shared):
            raise StopRequested
        return [one for _, one in shared]

    def get_batch_samples(self, *arguments: Any, **keywords: Any) -> Any:
        self.window = Window(time.monotonic())
        self.activity = "load batch"
        found = super().get_batch_samples(*arguments, **keywords)
        self.window.inputs = found[0]
        return found

    def tokens_of_all(self, batches: list[Batch], count: Any) -> Any:
        if self._at_hand is not None:  # an evaluation's batch has a loss of its own
            return count
        self.window.waited_s = time.monotonic() - self.window.began
        if self.ranks.count == 1:
            return count
        self._leave_out_surplus(batches)
        tokens = sum(_supervised(batch) for batch in batches)
        return torch.tensor(float(sum(self._stop_together("batch", tokens))), device=self.args.device)

    def _leave_out_surplus(self, batches: list[Batch]) -> None:
        """Accelerate gives all ranks as many samples: where they do not suffice, the epoch's first ones again."""
        args, samples, ranks = self.args, len(self.train_dataset), self.ranks
        each, accumulation = args.train_batch_size, args.gradient_accumulation_steps
        steps = optimiser_steps(samples, each, accumulation, ranks.count, args.dataloader_drop_last)
        for number, batch in enumerate(batches, self.state.global_step % steps * accumulation):
            self._keep(batch, self.train_dataset, remaining(samples, each, number, ranks.rank, ranks.count))

    def _keep(self, batch: Batch, dataset: Numbered, count: int) -> None:
        """Leaves out all but the first `count` samples of a batch."""
        if count < len(batch["sample_indices"]):
            current = self._encoded(dataset, batch["sample_indices"][:count])
            batch.clear()
            batch.update(current)

    def model_inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Without the padding mask: rows are padded on the right, where causal attention never looks, and a mask would
        cost the flash kernel."""
        left_out = ("attention_mask", "sample_indices", "shown", "tokens")
        return {name: value for name, value in batch.items() if name not in left_out}

    def _encoded(self, dataset: Numbered, indices: list[int]) -> Batch:
        """These samples as they are shown now, on the training device."""
        if not len(indices):
            return {"sample_indices": [], "labels": torch.empty(1, 0), "tokens": 0, "shown": dataset.dataset.shown}
        return self.on_device(self.data_collator([dataset[index] for index in indices]))

    def _bring_up_to_date(self, batch: Batch, dataset: Numbered) -> None:
        """Encodes a batch again when it was made before the run stepped down. In place: Trainer holds it too."""
        if not dataset.is_current(batch):
            current = self._encoded(dataset, batch["sample_indices"])
            batch.clear()
            batch.update(current)


def _supervised(batch: Batch) -> int:
    """Its supervised tokens. What the collator has counted does not make the host wait for the GPU."""
    return len(batch["supervised"]) if "supervised" in batch else int((batch["labels"][..., 1:] != IGNORED).sum())
