"""Batches that say which samples they hold and how those are shown.

A run that retreats to fewer or smaller frames finds batches on their way that were encoded before: worker processes
work ahead, and keep their copy of the dataset until the epoch ends. Such a batch tells itself and is encoded again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from surgvqa.data.dataset import ClipDataset, Item

Batch = dict[str, Any]


@dataclass
class Numbered:
    """A dataset whose items say their index, and the (num_frames, image_size) that they are shown with."""

    dataset: ClipDataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Item:
        return {**self.dataset[index], "sample_index": index, "shown": self.dataset.shown}

    def is_current(self, batch: Batch) -> bool:
        """Whether the batch shows its samples as the dataset does now."""
        return tuple(batch["shown"]) == self.dataset.shown


@dataclass
class NumberedCollator:
    """`collate`'s batch with sample_indices (numpy, [B]) and shown (num_frames, image_size).

    The indices come first: Trainer takes the length of a batch's first array for the number of its samples, and a
    packed batch has one row for all of them.
    """

    collate: Callable[[Sequence[Item]], Batch]

    def __call__(self, items: Sequence[Item]) -> Batch:
        return {
            "sample_indices": np.array([item["sample_index"] for item in items]),
            **self.collate(items),
            "shown": items[0]["shown"],
        }
