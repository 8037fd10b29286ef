"""Batches that record which samples they contain and how those were shown.

When a run steps down to fewer or smaller frames, some batches are already encoded the old way, because worker
processes work ahead and keep their own copy of the dataset until the epoch ends. Each batch records how it was encoded,
so a stale one is detected and encoded again. If its features have been evicted from the cache by then, it has only the
numbers of its samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import get_worker_info

from surgvqa.data.dataset import ClipDataset, EncodedSample, FeaturesGone
from surgvqa.data.prompt import IGNORED

Batch = dict[str, Any]


@dataclass
class Numbered:
    """A dataset whose items record their index and the (num_frames, image_size, audio_span) they were encoded with.

    If an item's features are missing from the cache, a worker process returns it without them and with `shown` None.
    The main process, which knows the current setting, encodes the item again or raises the error.
    """

    dataset: ClipDataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> EncodedSample:
        try:
            item, shown = self.dataset[index], self.dataset.shown
        except FeaturesGone:
            if get_worker_info() is None:
                raise
            item, shown = self.dataset.words(index), None
        return {**item, "sample_index": index, "shown": shown}

    def is_current(self, batch: Batch) -> bool:
        """Whether the batch was encoded with the dataset's current setting."""
        return batch["shown"] is not None and tuple(batch["shown"]) == self.dataset.shown


@dataclass
class NumberedCollator:
    """`collate`'s batch with sample_indices (numpy, [B]) and shown (num_frames, image_size, audio_span).

    The indices come first, because Trainer counts a batch's samples by the length of its first array, and a packed
    batch has a single row for all of them.
    """

    collate: Callable[[Sequence[EncodedSample]], Batch]

    def __call__(self, items: Sequence[EncodedSample]) -> Batch:
        batch = {"sample_indices": np.array([item["sample_index"] for item in items])}
        if any(item["shown"] is None for item in items):  # Trainer counts the labels of the whole window
            labels = [torch.from_numpy(item["labels"]) for item in items]
            return batch | {"labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED), "shown": None}
        return batch | self.collate(items) | {"shown": items[0]["shown"]}
