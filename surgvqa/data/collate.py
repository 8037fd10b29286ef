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
    offset: int = 0
    """Lengths are rounded up to `offset` and a multiple of `multiple_of`, so that few different ones occur."""
    packed: bool = False
    """Several samples stand in one row one after another; only the row's end is padded. For training."""

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        """B samples, L tokens in the longest, F frames and P patches in all.

        input_ids, attention_mask, labels int64 [B, L]; image_grid_thw int64 [F, 3]; pixel_values float32 [P, 1176] and
        input_features float32 [B, mels, T], or what the encoders made of them: image_features [image tokens, hidden]
        and audio_features [B, audio tokens, d_model].

        For training also what the model would make of these on the GPU, and the host wait for: position_ids int64
        [3, B, L], host_ids (numpy) and supervised int64 [S], see the model's forward; and the number of tokens that are
        no padding, tokens.

        Packed, with more than one sample: B is 1 in these, and there are also cu_seq_lens int32 [samples + 1] and
        max_length, the places where the samples begin and the last one ends and the length of the longest (see the
        model's forward).
        """
        rows = [[item] for item in items]
        if self.packed:  # none is asked to say the next one's first token: a prompt is not learned
            rows = [list(items)]
        ids = [np.concatenate([item["input_ids"] for item in row]) for row in rows]
        batch: dict[str, Any] = {
            "input_ids": self._pad(ids, self.processors.pad_token_id),
            "attention_mask": self._pad([np.ones_like(i) for i in ids], 0),
            "labels": self._pad([np.concatenate([item["labels"] for item in row]) for row in rows], IGNORED),
            "image_grid_thw": torch.from_numpy(np.concatenate([item["image_grid_thw"] for item in items])),
        }
        if self.padding_side == "right":
            batch["position_ids"] = self._positions(rows, batch["input_ids"].shape[1])
            # a copy: a worker process moves the tensor to shared memory, and the array would be left without
            batch["host_ids"] = batch["input_ids"].numpy().copy()
            following = np.pad(batch["labels"].numpy()[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)
            batch["supervised"] = torch.from_numpy(np.flatnonzero(following != IGNORED))
            batch["tokens"] = sum(len(row) for row in ids)
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

    def _positions(self, rows: Sequence[Sequence[Item]], length: int) -> torch.Tensor:
        """M-RoPE positions, which begin anew with each sample; 0 where a row is padded."""
        positions = np.zeros((3, len(rows), length), dtype=np.int64)
        for number, row in enumerate(rows):
            found = [mrope_positions(self.processors, item["input_ids"], item["image_grid_thw"]) for item in row]
            joined = np.concatenate(found, axis=1)
            positions[:, number, : joined.shape[1]] = joined
        return torch.from_numpy(positions)

    def _borders(self, items: Sequence[Item], length: int) -> dict[str, Any]:
        """What keeps the samples of a packed row apart. The padding at its end belongs to the last one."""
        borders = np.cumsum([0, *(len(item["input_ids"]) for item in items)], dtype=np.int32)
        borders[-1] = length
        return {
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
        return self.offset - (self.offset - length) // self.multiple_of * self.multiple_of
