"""Batches that say which samples they hold and how those are shown.

A run that retreats to fewer or smaller frames finds batches on their way that were encoded before: worker processes
work ahead, and keep their copy of the dataset until the epoch ends. Such a batch tells itself and is encoded again.
What it shows may be gone from the feature cache by then: it comes without, as a list of its samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import get_worker_info

from surgvqa.data.dataset import ClipDataset, FeaturesGone, Item
from surgvqa.data.prompt import IGNORED

Batch = dict[str, Any]


@dataclass
class Numbered:
    """A dataset whose items say their index, and the (num_frames, image_size) that they are shown with.

    A worker process gives an item whose features are gone without them, and `shown` is None: the main process, which
    knows whether another way of showing it holds by now, encodes it again or raises the error.
    """

    dataset: ClipDataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Item:
        try:
            item, shown = self.dataset[index], self.dataset.shown
        except FeaturesGone:
            if get_worker_info() is None:
                raise
            item, shown = self.dataset.words(index), None
        return {**item, "sample_index": index, "shown": shown}

    def is_current(self, batch: Batch) -> bool:
        """Whether the batch shows its samples as the dataset does now."""
        return batch["shown"] is not None and tuple(batch["shown"]) == self.dataset.shown


@dataclass
class NumberedCollator:
    """`collate`'s batch with sample_indices (numpy, [B]) and shown (num_frames, image_size).

    The indices come first: Trainer takes the length of a batch's first array for the number of its samples, and a
    packed batch has one row for all of them.
    """

    collate: Callable[[Sequence[Item]], Batch]

    def __call__(self, items: Sequence[Item]) -> Batch:
        batch = {"sample_indices": np.array([item["sample_index"] for item in items])}
        if any(item["shown"] is None for item in items):  # Trainer counts the labels of the whole window
            labels = [torch.from_numpy(item["labels"]) for item in items]
            return batch | {"labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED), "shown": None}
        return batch | self.collate(items) | {"shown": items[0]["shown"]}
