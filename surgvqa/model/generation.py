"""Greedy answers to several prompts at once: one pass over the prompts, then a token a step.

Prompts are padded on the right. No token sees what follows it, so the prompts need no mask and each gives what it gives
alone. Keys and values stand in tensors of a fixed size, and each new token takes the place of the first pad of its
own row. So every step has the same shapes and the same addresses, and on a GPU one step is recorded once as a CUDA
graph and replayed: launched one by one, its kernels keep the GPU waiting for five sixths of the time.
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


class KeyValues:
    """Keys and values of all layers, in the place of transformers' Cache.

    A row (a sample) has room for `room` tokens. In the pass over the prompts a layer's keys and values are kept and
    handed on as they came; in a step those of the new tokens are put at `places`, and the whole room is handed on.
    """

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.room = 0
        self.places: Tensor | None = None
        """[B]: where the next token of each row stands; None in the pass over the prompts."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that came before; what the model asks to know whether this is the prompt."""
        return 0 if self.places is None else self.room

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """What a layer attends to, given the keys and values [B, heads, tokens, size] of the tokens at hand."""
        if self.places is None:
            extra = self.room - keys.shape[2]
            self.layers.append((F.pad(keys, (0, 0, 0, extra)), F.pad(values, (0, 0, 0, extra))))
            return keys, values
        rows = torch.arange(len(self.places), device=self.places.device)
        all_keys, all_values = self.layers[layer_idx]
        all_keys[rows, :, self.places] = keys[:, :, 0]
        all_values[rows, :, self.places] = values[:, :, 0]
        return all_keys, all_values


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


class Steps:
    """The steps after the prompts: each gives every row one more token."""

    def __init__(
        self,
        model: AudioQwen2VLForConditionalGeneration,
        cache: KeyValues,
        lengths: Tensor,
        positions: Tensor,
    ):
        """`lengths` [B]: tokens of each prompt. `positions` [B]: M-RoPE position of the first new token of each."""
        self.model, self.cache = model, cache
        device = model.device
        cache.places = lengths.to(device)
        self.positions = positions.to(device)
        self.embeds: Tensor | None = None
        self.graph: Any = None
        self.ids: Tensor

    def next(self, ids: Tensor) -> Tensor:
        """[B] ids of the tokens after the tokens `ids` [B]."""
        embeds = self.model.embed(ids[:, None])
        if self.embeds is None:
            self.embeds = embeds
            if embeds.is_cuda:
                self._record()
                return self.ids
            self.ids = self._step()
        else:
            self.embeds.copy_(embeds)
            if self.graph is not None:
                self.graph.replay()
            else:
                self.ids = self._step()
        return self.ids

    def _step(self) -> Tensor:
        """From `self.embeds` to the next ids; moves the places and positions on."""
        cache, text = self.cache, self.model.model.language_model
        assert cache.places is not None and self.embeds is not None
        seen = torch.arange(cache.room, device=self.embeds.device) <= cache.places[:, None]
        hidden = text(
            inputs_embeds=self.embeds,
            attention_mask={"full_attention": _additive(seen, self.embeds.dtype)[:, None, None]},
            position_ids=self.positions[None, :, None].expand(3, -1, -1),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        cache.places += 1
        self.positions += 1
        return self.model.lm_head(hidden[:, -1]).float().argmax(-1)

    def _record(self) -> None:
        """The first step, run once as it is, which readies the libraries, and recorded for those that follow."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            ids = self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):  # computes nothing yet: the places and positions stay as they are
            self.ids = self._step()
        self.ids.copy_(ids)


@torch.inference_mode()
def generate(
    model: AudioQwen2VLForConditionalGeneration,
    batch: dict[str, Any],
    *,
    max_new_tokens: int,
    end_token_id: int,
) -> list[list[int]]:
    """Ids of each sample's greedy answer, up to its end token (which is left out) or `max_new_tokens`.

    `batch`: as `Collator` with right padding makes it, on the model's device: input_ids, attention_mask [B, L],
    position_ids [3, B, L], and pixels or features.
    """
    mask = batch["attention_mask"]
    lengths = mask.sum(1)
    cache = KeyValues()
    cache.room = -(-(mask.shape[1] + max_new_tokens) // ROOM_MULTIPLE) * ROOM_MULTIPLE
    rows = torch.arange(len(mask), device=mask.device)
    prompt: dict[str, Any] = {
        name: value for name, value in batch.items() if name not in ("attention_mask", "labels", "supervised")
    }
    logits = model(
        **prompt,
        attention_mask={"full_attention": _causal(model, mask.shape[1])},
        past_key_values=cache,
        use_cache=True,
        read_at=rows * mask.shape[1] + lengths - 1,
    ).logits
    ids = logits.float().argmax(-1)
    last = batch["position_ids"].masked_fill(mask == 0, -1).amax((0, 2))
    steps = Steps(model, cache, lengths, last + 1)
    answers: list[list[int]] = [[] for _ in lengths]
    going = set(range(len(answers)))
    text = model.model.language_model
    attention = attention_of(text.config)
    set_attention(text.config, STEP_ATTENTION)
    try:
        for number in range(max_new_tokens):
            said = ids.tolist()
            going = {row for row in going if said[row] != end_token_id}
            for row in going:
                answers[row].append(said[row])
            if not going or number + 1 == max_new_tokens:
                break
            ids = steps.next(ids)
    finally:
        set_attention(text.config, attention)
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
