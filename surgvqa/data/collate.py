"""From encoded samples to a batch of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from surgvqa.data.dataset import Item
from surgvqa.data.processors import Processors
from surgvqa.data.prompt import IGNORED


@dataclass
class Collator:
    """Pads on the right for training and on the left for generation, where every prompt must end at the same place."""

    processors: Processors
    padding_side: Literal["left", "right"] = "right"
    multiple_of: int = 1
    """Lengths are rounded up to a multiple of this, so that few different ones occur."""

    def __call__(self, items: Sequence[Item]) -> dict[str, torch.Tensor]:
        """B samples, L tokens in the longest, F frames and P patches in all.

        input_ids, attention_mask, labels int64 [B, L]; image_grid_thw int64 [F, 3]; pixel_values float32 [P, 1176] and
        input_features float32 [B, mels, T], or what the encoders made of them: image_features [image tokens, hidden]
        and audio_features [B, audio tokens, d_model].
        """
        ids = [item["input_ids"] for item in items]
        batch = {
            "input_ids": self._pad(ids, self.processors.pad_token_id),
            "attention_mask": self._pad([np.ones_like(i) for i in ids], 0),
            "labels": self._pad([item["labels"] for item in items], IGNORED),
            "image_grid_thw": torch.from_numpy(np.concatenate([item["image_grid_thw"] for item in items])),
        }
        if "image_features" in items[0]:
            return batch | {
                "image_features": torch.cat([item["image_features"] for item in items]),
                "audio_features": torch.stack([item["audio_features"] for item in items]),
            }
        return batch | {
            "pixel_values": torch.from_numpy(np.concatenate([item["pixel_values"] for item in items])),
            "input_features": torch.from_numpy(np.stack([item["input_features"] for item in items])),
        }

    def _pad(self, rows: Sequence[np.ndarray], value: int) -> torch.Tensor:
        batch = np.full((len(rows), self._length(rows)), value, dtype=np.int64)
        for target, row in zip(batch, rows):
            if self.padding_side == "left":
                target[len(target) - len(row) :] = row
            else:
                target[: len(row)] = row
        return torch.from_numpy(batch)

    def _length(self, rows: Sequence[np.ndarray]) -> int:
        return -(-max(map(len, rows)) // self.multiple_of) * self.multiple_of
