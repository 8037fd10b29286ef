"""Greedy answers to several prompts at once: one pass over the prompts, then one token per step.

Prompts are padded on the right. No token attends to later ones, so the prompts need no mask, and each gives the same
result as alone. Keys and values are in tensors of a fixed size, and each new token replaces the first pad of its row.
So every step has the same shapes and addresses, and on a GPU one step is recorded as a CUDA graph and replayed, unless
the model is divided among several. With kernels launched one by one, the GPU would wait for more than half of the time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from surgvqa.model.audio_qwen2vl import AudioQwen2VLForConditionalGeneration
from surgvqa.model.grouped_attention import attend_grouped
from surgvqa.model.transformers_internals import attention_of, register_attention, set_attention

STEP_ATTENTION = "surgvqa_grouped"
"""Name of `grouped_attention` among transformers' attention functions."""
LENGTHS = 64
"""Prompts are padded to a multiple of this, so that few lengths occur; kernels are chosen for each length."""
ROOM_MULTIPLE = 64
"""The capacity of a row in tokens is a multiple of this, because kernels need a mask with aligned rows."""


def grouped_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one new token per row: [B, 1, heads, size].

    `query` is [B, heads, 1, size], `key` and `value` are [B, groups, room, size], `attention_mask` is [B, 1, 1, room].
    transformers would repeat the keys for each head, and so read and write the cache seven times in every step.
    """
    assert attention_mask is not None
    return attend_grouped(query, key, value, attention_mask, scaling), None


register_attention(STEP_ATTENTION, grouped_attention)


class KeyValues:
    """Keys and values of all layers, for `rows` samples of up to `room` tokens. Replaces transformers' Cache.

    In the pass over the prompts, a layer's keys and values are stored and returned unchanged. In a step, those of the
    new tokens are stored at `places`, and the whole tensors are returned.
    """

    def __init__(self, model: AudioQwen2VLForConditionalGeneration, rows: int, room: int):
        config = model.model.language_model.config
        size = config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, 2, rows, config.num_key_value_heads, room, size)
        self.kept = torch.zeros(
            shape, dtype=model.dtype, device=model.device
        )  # zeros, because masked values must be finite
        self.room = room
        self.places = torch.zeros(rows, dtype=torch.long, device=model.device)
        """[rows]: position of each row's next token."""
        self.in_steps = False
        self._rows = torch.arange(rows, device=model.device)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of earlier tokens; the model uses it to recognise the prompt."""
        return self.room if self.in_steps else 0

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Stores the new tokens' keys and values [rows, heads, tokens, size]; returns those to attend to."""
        all_keys, all_values = self.kept[layer_idx]
        if not self.in_steps:
            all_keys[:, :, : keys.shape[2]] = keys
            all_values[:, :, : values.shape[2]] = values
            return keys, values
        all_keys[self._rows, :, self.places] = keys[:, :, 0]
        all_values[self._rows, :, self.places] = values[:, :, 0]
        return all_keys, all_values


class Steps:
    """The steps after the prompts, each of which gives every row one more token. Reusable for batches of its shape."""

    def __init__(self, model: AudioQwen2VLForConditionalGeneration, rows: int, room: int):
        self.model, self.cache, self.shape = model, KeyValues(model, rows, room), (rows, room)
        self.positions = torch.zeros(rows, dtype=torch.long, device=model.device)
        """[rows]: M-RoPE position of each row's next token."""
        self.embeds: Tensor | None = None
        self.ids: Tensor | None = None
        self.graph: Any = None

    def begin(self, lengths: Tensor, positions: Tensor) -> None:
        """Starts after prompts of `lengths` [rows] tokens; `positions` [rows] are those of their first new tokens."""
        self.cache.places.copy_(lengths)
        self.positions.copy_(positions)
        self.cache.in_steps = True

    def next(self, ids: Tensor) -> Tensor:
        """Ids [rows] of the tokens that follow the tokens `ids` [rows]."""
        embeds = self.model.embed(ids[:, None])
        if self.embeds is None:
            self.embeds = torch.empty_like(embeds)
        self.embeds.copy_(embeds)
        if self.graph is not None:
            self.graph.replay()
        elif embeds.is_cuda and not self.model.divided:
            self._record()
        else:
            self.ids = self._step()
        assert self.ids is not None
        return self.ids

    def _step(self) -> Tensor:
        """Computes the next ids [rows] from `self.embeds` and advances places and positions."""
        cache, embeds = self.cache, self.embeds
        assert embeds is not None
        seen = torch.arange(cache.room, device=embeds.device) <= cache.places[:, None]
        hidden = self.model.model.language_model(
            inputs_embeds=embeds,
            attention_mask={"full_attention": _additive_mask(seen, embeds.dtype)[:, None, None]},
            position_ids=self.positions[None, :, None].expand(3, -1, -1),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        cache.places += 1
        self.positions += 1
        return self.model.lm_head(hidden[:, -1]).float().argmax(-1)

    def _record(self) -> None:
        """Runs one step directly, which also initialises the libraries, and records it for the following steps."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            ids = self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):  # only records, so places and positions do not change
            self.ids = self._step()
        self.ids.copy_(ids)


class Generator:
    """Answers batch after batch and reuses the steps for batches of the same shape."""

    def __init__(self, model: AudioQwen2VLForConditionalGeneration):
        self.model = model
        self._steps: Steps | None = None

    @torch.inference_mode()
    def answer(self, batch: dict[str, Any], *, max_new_tokens: int, end_token_id: int) -> list[list[int]]:
        """Token ids of each sample's greedy answer, without its end token, at most `max_new_tokens`.

        `batch` comes from `Collator` with right padding and is on the model's device: input_ids and attention_mask
        [B, L], position_ids [3, B, L], and pixels or features.
        """
        mask = batch["attention_mask"]
        rows, length = mask.shape
        steps = self._steps_for(rows, -(-(length + max_new_tokens) // ROOM_MULTIPLE) * ROOM_MULTIPLE)
        lengths = mask.sum(1)
        unused = ("attention_mask", "labels", "supervised", "tokens")
        prompt: dict[str, Any] = {name: value for name, value in batch.items() if name not in unused}
        steps.cache.in_steps = False
        logits = self.model(
            **prompt,
            attention_mask={"full_attention": _causal_mask(self.model, length)},
            past_key_values=steps.cache,
            use_cache=True,
            read_at=torch.arange(rows, device=mask.device) * length + lengths - 1,
        ).logits
        ids = logits.float().argmax(-1)
        last = batch["position_ids"].masked_fill(mask == 0, -1).amax((0, 2))
        steps.begin(lengths, last + 1)
        config = self.model.model.language_model.config
        attention = attention_of(config)
        set_attention(config, STEP_ATTENTION)
        try:
            return self._decode(steps, ids, max_new_tokens, end_token_id)
        finally:
            set_attention(config, attention)

    def _steps_for(self, rows: int, room: int) -> Steps:
        if self._steps is None or self._steps.shape != (rows, room):
            self._steps = None  # free its memory first
            self._steps = Steps(self.model, rows, room)
        return self._steps

    def _decode(self, steps: Steps, ids: Tensor, most: int, end_token_id: int) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in ids]
        going = set(range(len(answers)))
        for number in range(most):
            next_ids = ids.tolist()
            going = {row for row in going if next_ids[row] != end_token_id}
            for row in going:
                answers[row].append(next_ids[row])
            if not going or number + 1 == most:
                break
            ids = steps.next(ids)
        return answers


def _causal_mask(model: AudioQwen2VLForConditionalGeneration, length: int) -> Tensor | None:
    """The causal mask [1, 1, length, length] of the prompts for eager attention; other kernels need none (None)."""
    if attention_of(model.model.language_model.config) != "eager":
        return None
    return _additive_mask(torch.ones(1, 1, length, length, dtype=torch.bool, device=model.device).tril_(), model.dtype)


def _additive_mask(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add to attention scores: 0 where `seen`, else minus infinity."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
