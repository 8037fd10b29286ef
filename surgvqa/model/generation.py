"""Greedy answers to several prompts at once: one pass over the prompts, then a token a step.

Prompts are padded on the right. No token sees what follows it, so the prompts need no mask and each gives what it gives
alone. Keys and values stand in tensors of a fixed size, and each new token takes the place of the first pad of its
own row. So every step has the same shapes and the same addresses, and on a GPU one step is recorded as a CUDA graph
and replayed: launched one by one, its kernels keep the GPU waiting for more than half of the time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from surgvqa.model.audio_qwen2vl import AudioQwen2VLForConditionalGeneration
from surgvqa.model.transformers_internals import attention_of, register_attention, set_attention

STEP_ATTENTION = "surgvqa_grouped"
"""Name of `grouped_attention` among transformers' attention functions."""
ROOM_MULTIPLE = 64
"""The tokens that a row has room for are a multiple of this: kernels want a mask whose rows are aligned."""
STEP_KERNELS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""For steps: the other kernels take no mask, or (cuDNN) plan anew for each shape."""


def grouped_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one new token a row: [B, 1, heads, size] from `query` [B, heads, 1, size], `key` and `value`
    [B, groups, room, size], `attention_mask` [B, 1, 1, room].

    The heads that share keys are taken for so many tokens of one head. Repeating the keys for each head, as
    transformers does where there is a mask, would read and write the cache seven times in every step.
    """
    batch, heads, _, size = query.shape
    groups = key.shape[1]
    shared = query.reshape(batch, groups, heads // groups, size)
    with sdpa_kernel(STEP_KERNELS):
        found = F.scaled_dot_product_attention(shared, key, value, attn_mask=attention_mask, scale=scaling)
    return found.reshape(batch, 1, heads, size), None


register_attention(STEP_ATTENTION, grouped_attention)


class KeyValues:
    """Keys and values of all layers, in the place of transformers' Cache; `rows` samples with room for `room` tokens.

    In the pass over the prompts a layer's keys and values are kept and handed on as they came; in a step those of the
    new tokens are put at `places`, and the whole room is handed on.
    """

    def __init__(self, model: AudioQwen2VLForConditionalGeneration, rows: int, room: int):
        config = model.model.language_model.config
        size = config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, 2, rows, config.num_key_value_heads, room, size)
        self.kept = torch.zeros(shape, dtype=model.dtype, device=model.device)  # zeros: what is masked must be finite
        self.room = room
        self.places = torch.zeros(rows, dtype=torch.long, device=model.device)
        """[rows]: where the next token of each stands."""
        self.in_steps = False
        self._rows = torch.arange(rows, device=model.device)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that came before; what the model asks to know whether this is the prompt."""
        return self.room if self.in_steps else 0

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """What a layer attends to, given the keys and values [rows, heads, tokens, size] of the tokens at hand."""
        all_keys, all_values = self.kept[layer_idx]
        if not self.in_steps:
            all_keys[:, :, : keys.shape[2]] = keys
            all_values[:, :, : values.shape[2]] = values
            return keys, values
        all_keys[self._rows, :, self.places] = keys[:, :, 0]
        all_values[self._rows, :, self.places] = values[:, :, 0]
        return all_keys, all_values


class Steps:
    """The steps after the prompts: each gives every row one more token. Serves any number of batches of its shape."""

    def __init__(self, model: AudioQwen2VLForConditionalGeneration, rows: int, room: int):
        self.model, self.cache, self.shape = model, KeyValues(model, rows, room), (rows, room)
        self.positions = torch.zeros(rows, dtype=torch.long, device=model.device)
        """[rows]: M-RoPE position of the next token of each."""
        self.embeds: Tensor | None = None
        self.ids: Tensor | None = None
        self.graph: Any = None

    def begin(self, lengths: Tensor, positions: Tensor) -> None:
        """After the prompts, of `lengths` [rows] tokens; `positions` [rows] of their first new tokens."""
        self.cache.places.copy_(lengths)
        self.positions.copy_(positions)
        self.cache.in_steps = True

    def next(self, ids: Tensor) -> Tensor:
        """[rows] ids of the tokens after the tokens `ids` [rows]."""
        embeds = self.model.embed(ids[:, None])
        if self.embeds is None:
            self.embeds = torch.empty_like(embeds)
        self.embeds.copy_(embeds)
        if self.graph is not None:
            self.graph.replay()
        elif embeds.is_cuda:
            self._record()
        else:
            self.ids = self._step()
        assert self.ids is not None
        return self.ids

    def _step(self) -> Tensor:
        """From `self.embeds` to the next ids; moves the places and positions on."""
        cache, embeds = self.cache, self.embeds
        assert embeds is not None
        seen = torch.arange(cache.room, device=embeds.device) <= cache.places[:, None]
        hidden = self.model.model.language_model(
            inputs_embeds=embeds,
            attention_mask={"full_attention": _additive(seen, embeds.dtype)[:, None, None]},
            position_ids=self.positions[None, :, None].expand(3, -1, -1),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        cache.places += 1
        self.positions += 1
        return self.model.lm_head(hidden[:, -1]).float().argmax(-1)

    def _record(self) -> None:
        """One step as it is, which also readies the libraries, and a recording of it for all that follow."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            ids = self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):  # computes nothing yet: the places and positions stay as they are
            self.ids = self._step()
        self.ids.copy_(ids)


class Generator:
    """Answers batch after batch; what one batch needed serves the next of the same shape."""

    def __init__(self, model: AudioQwen2VLForConditionalGeneration):
        self.model = model
        self._steps: Steps | None = None

    @torch.inference_mode()
    def answer(self, batch: dict[str, Any], *, max_new_tokens: int, end_token_id: int) -> list[list[int]]:
        """Ids of each sample's greedy answer, up to its end token (which is left out) or `max_new_tokens`.

        `batch`: as `Collator` with right padding makes it, on the model's device: input_ids, attention_mask [B, L],
        position_ids [3, B, L], and pixels or features.
        """
        mask = batch["attention_mask"]
        rows, length = mask.shape
        steps = self._ready(rows, -(-(length + max_new_tokens) // ROOM_MULTIPLE) * ROOM_MULTIPLE)
        lengths = mask.sum(1)
        unused = ("attention_mask", "labels", "supervised", "tokens")
        prompt: dict[str, Any] = {name: value for name, value in batch.items() if name not in unused}
        steps.cache.in_steps = False
        logits = self.model(
            **prompt,
            attention_mask={"full_attention": _causal(self.model, length)},
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
            return self._go_on(steps, ids, max_new_tokens, end_token_id)
        finally:
            set_attention(config, attention)

    def _ready(self, rows: int, room: int) -> Steps:
        if self._steps is None or self._steps.shape != (rows, room):
            self._steps = None  # its memory first
            self._steps = Steps(self.model, rows, room)
        return self._steps

    def _go_on(self, steps: Steps, ids: Tensor, most: int, end_token_id: int) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in ids]
        going = set(range(len(answers)))
        for number in range(most):
            said = ids.tolist()
            going = {row for row in going if said[row] != end_token_id}
            for row in going:
                answers[row].append(said[row])
            if not going or number + 1 == most:
                break
            ids = steps.next(ids)
        return answers


def _causal(model: AudioQwen2VLForConditionalGeneration, length: int) -> Tensor | None:
    """The mask [1, 1, length, length] that the attention of the prompts needs: None but for eager attention, which has
    no notion of causal."""
    if attention_of(model.model.language_model.config) != "eager":
        return None
    return _additive(torch.ones(1, 1, length, length, dtype=torch.bool, device=model.device).tril_(), model.dtype)


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `seen`, else minus infinity."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
