"""Combines encoded samples into a batch of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from surgvqa.data.dataset import EncodedSample
from surgvqa.data.processors import Processors
from surgvqa.data.prompt import IGNORED, mrope_positions


@dataclass
class Collator:
    """Makes batches, padded on `padding_side`, or packed."""

    processors: Processors
    padding_side: Literal["left", "right"] = "right"
    multiple_of: int = 1
    offset: int = 0
    """Lengths are rounded up to `offset` plus a multiple of `multiple_of`, so that few different lengths occur."""
    packed: bool = False
    """All samples are in one row, one after another; only the end of the row is padded. For training."""

    def __call__(self, items: Sequence[EncodedSample]) -> dict[str, Any]:
        """The batch of B samples with L tokens in the longest, and F frames and P patches in all.

        input_ids, attention_mask, labels int64 [B, L]; image_grid_thw int64 [F, 3]; pixel_values float32 [P, 1176] and
        input_features float32 [B, mels, T], or the encoders' outputs: image_features [image tokens, hidden] and
        audio_features [audio tokens, d_model]; no audio if the question is only written. audio_tokens is the list of
        each sample's number of audio tokens.

        For training, also tensors that the model would otherwise compute on the GPU while the host waits:
        position_ids int64 [3, B, L], host_ids (numpy) and supervised int64 [S] (see the model's forward); and tokens,
        the number of tokens without padding.

        Packed, with more than one sample, B is 1, and there are also cu_seq_lens int32 [samples + 1] and max_length,
        the samples' boundaries and the length of the longest (see the model's forward).
        """
        rows = [[item] for item in items]
        if self.packed:  # no sample learns to predict the next one's first token, because prompts have no labels
            rows = [list(items)]
        ids = [np.concatenate([item["input_ids"] for item in row]) for row in rows]
        batch: dict[str, Any] = {
            "input_ids": self._pad(ids, self.processors.pad_token_id),
            "attention_mask": self._pad([np.ones_like(i) for i in ids], 0),
            "labels": self._pad([np.concatenate([item["labels"] for item in row]) for row in rows], IGNORED),
            "image_grid_thw": torch.from_numpy(np.concatenate([item["image_grid_thw"] for item in items])),
            "audio_tokens": [item["audio_tokens"] for item in items],
        }
        if self.padding_side == "right":
            batch["position_ids"] = self._positions(rows, batch["input_ids"].shape[1])
            # a copy, because a worker process moves the tensor's memory to shared memory and the array would lose it
            batch["host_ids"] = batch["input_ids"].numpy().copy()
            following = np.pad(batch["labels"].numpy()[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)
            batch["supervised"] = torch.from_numpy(np.flatnonzero(following != IGNORED))
            batch["tokens"] = sum(len(row) for row in ids)
        if len(rows) < len(items):
            batch |= self._boundaries(items, batch["input_ids"].shape[1])
        if "image_features" in items[0]:
            batch["image_features"] = torch.cat([item["image_features"] for item in items])
        else:
            batch["pixel_values"] = torch.from_numpy(np.concatenate([item["pixel_values"] for item in items]))
        if "audio_features" in items[0]:
            batch["audio_features"] = torch.cat([item["audio_features"] for item in items])
        elif "input_features" in items[0]:
            batch["input_features"] = torch.from_numpy(np.stack([item["input_features"] for item in items]))
        return batch

    def _positions(self, rows: Sequence[Sequence[EncodedSample]], length: int) -> torch.Tensor:
        """M-RoPE positions int64 [3, B, length], which restart with each sample; 0 for padding."""
        positions = np.zeros((3, len(rows), length), dtype=np.int64)
        for number, row in enumerate(rows):
            found = [mrope_positions(self.processors, item["input_ids"], item["image_grid_thw"]) for item in row]
            joined = np.concatenate(found, axis=1)
            positions[:, number, : joined.shape[1]] = joined
        return torch.from_numpy(positions)

    def _boundaries(self, items: Sequence[EncodedSample], length: int) -> dict[str, Any]:
        """The boundaries of the samples in a packed row. The padding at its end belongs to the last sample."""
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
