"""From encoded samples to a batch of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from surgvqa.data.dataset import Item
from surgvqa.data.processors import Processors
from surgvqa.data.prompt import IGNORED, mrope_positions


@dataclass
class Collator:
    """Pads on the right for training and on the left for generation, where every prompt must end at the same place."""

    processors: Processors
    padding_side: Literal["left", "right"] = "right"
    multiple_of: int = 1
    """Lengths are rounded up to a multiple of this, so that few different ones occur."""
    packed: bool = False
    """Several samples stand in one row one after another; only the row's end is padded. For training."""

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        """B samples, L tokens in the longest, F frames and P patches in all.

        input_ids, attention_mask, labels int64 [B, L]; image_grid_thw int64 [F, 3]; pixel_values float32 [P, 1176] and
        input_features float32 [B, mels, T], or what the encoders made of them: image_features [image tokens, hidden]
        and audio_features [B, audio tokens, d_model].

        Packed, with more than one sample: the first three are [1, L], and there are also position_ids int64 [3, 1, L],
        cu_seq_lens int32 [B + 1] and max_length, the places where the samples begin and the last one ends and the
        length of the longest (see the model's forward).
        """
        rows = list(items) if not self.packed or len(items) == 1 else [self._joined(items)]
        ids = [row["input_ids"] for row in rows]
        batch = {
            "input_ids": self._pad(ids, self.processors.pad_token_id),
            "attention_mask": self._pad([np.ones_like(i) for i in ids], 0),
            "labels": self._pad([row["labels"] for row in rows], IGNORED),
            "image_grid_thw": torch.from_numpy(np.concatenate([item["image_grid_thw"] for item in items])),
        }
        if len(rows) < len(items):
            batch |= self._borders(items, batch["input_ids"].shape[1])
        if "image_features" in items[0]:
            return batch | {
                "image_features": torch.cat([item["image_features"] for item in items]),
                "audio_features": torch.stack([item["audio_features"] for item in items]),
            }
        return batch | {
            "pixel_values": torch.from_numpy(np.concatenate([item["pixel_values"] for item in items])),
            "input_features": torch.from_numpy(np.stack([item["input_features"] for item in items])),
        }

    def _joined(self, items: Sequence[Item]) -> Item:
        """One row of all the samples. None is asked to say the next one's first token: a prompt is not learned."""
        return {name: np.concatenate([item[name] for item in items]) for name in ("input_ids", "labels")}

    def _borders(self, items: Sequence[Item], length: int) -> dict[str, Any]:
        """What keeps the samples of a packed row apart. The padding at its end belongs to the last one."""
        ids = [item["input_ids"] for item in items]
        positions = [mrope_positions(self.processors, i, item["image_grid_thw"]) for i, item in zip(ids, items)]
        padding = np.zeros((3, length - sum(map(len, ids))), dtype=np.int64)
        borders = np.cumsum([0, *map(len, ids)], dtype=np.int32)
        borders[-1] = length
        return {
            "position_ids": torch.from_numpy(np.concatenate([*positions, padding], axis=1))[:, None],
            "cu_seq_lens": torch.from_numpy(borders),
            "max_length": self._rounded(int(np.diff(borders).max())),
        }

    def _pad(self, rows: Sequence[np.ndarray], value: int) -> torch.Tensor:
        batch = np.full((len(rows), self._rounded(max(map(len, rows)))), value, dtype=np.int64)
        for target, row in zip(batch, rows):
            if self.padding_side == "left":
                target[len(target) - len(row) :] = row
            else:
                target[: len(row)] = row
        return torch.from_numpy(batch)

    def _rounded(self, length: int) -> int:
        return -(-length // self.multiple_of) * self.multiple_of
