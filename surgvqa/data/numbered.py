"""Batches that record which samples they hold and how those were shown.

When a run steps down to fewer or smaller frames, some batches are already encoded the old way: worker processes work
ahead and keep their own copy of the dataset until the epoch ends. Each batch records how it was encoded, so a stale one
is detected and encoded again. Its features may be gone from the cache by then; it then holds no more than the numbers
of its samples.
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
    """A dataset whose items record their index and the (num_frames, image_size) they were encoded with.

    When an item's features are gone from the cache, a worker process returns it without them and with `shown` None. The
    main process knows the current setting: it encodes the item again or raises the error.
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
        """Whether the batch was encoded with the dataset's present setting."""
        return batch["shown"] is not None and tuple(batch["shown"]) == self.dataset.shown


@dataclass
class NumberedCollator:
    """`collate`'s batch with sample_indices (numpy, [B]) and shown (num_frames, image_size).

    The indices come first: Trainer counts a batch's samples by the length of its first array, and a packed batch has a
    single row for all of them.
    """

    collate: Callable[[Sequence[Item]], Batch]

    def __call__(self, items: Sequence[Item]) -> Batch:
        batch = {"sample_indices": np.array([item["sample_index"] for item in items])}
        if any(item["shown"] is None for item in items):  # Trainer counts the labels of the whole window
            labels = [torch.from_numpy(item["labels"]) for item in items]
            return batch | {"labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED), "shown": None}
        return batch | self.collate(items) | {"shown": items[0]["shown"]}
